"""What losses on token states share."""

from collections.abc import Callable

import torch
from torch import Tensor


def state_mse(
    loss: str,
    student: Tensor,  # [B, L, D]
    teacher: Tensor,  # [B, L, E]
    mask: Tensor,  # [B, L] bool
    projection: Callable[[Tensor], Tensor],  # [B, L, D] -> [B, L, E]
) -> Tensor:  # [B, L]
    """Mean over the width of (projection(student) - teacher)^2; 0 at padding. ValueError, which
    names the loss, where the widths differ after all."""
    keep = mask.unsqueeze(-1)
    # Before the projection too: its weight's gradient is a product with what it was given.
    projected = projection(torch.where(keep, student, 0.0))
    target = torch.where(keep, teacher.detach(), 0.0)
    if projected.shape != target.shape:
        raise ValueError(
            f"{loss}: the student's states come as {tuple(projected.shape)} and the teacher's are "
            f"{tuple(target.shape)}; project the student to the teacher's width."
        )
    wide = torch.promote_types(projected.dtype, torch.float32)
    gap = torch.where(keep, projected.to(wide) - target.to(wide), 0.0)
    return gap.square().mean(-1)
