"""Squared difference of hidden states."""

from collections.abc import Callable

import torch
from torch import Tensor

from mlkd_dist.trace import Layer

ROWS = "token"
SCOPE = "layer"
READS = ("hidden",)
TEACHER = True
PROJECTION = True
PACKED = True


def hidden_mse(
    student: Layer, teacher: Layer, projection: Callable[[Tensor], Tensor]
) -> Tensor:  # [B, L]
    """Mean over the teacher's width of (projection(h) - t)^2, h and t the layers' outputs.

    h is the student's, t the teacher's; 0 at padding. Raises ValueError where the projected width
    is not the teacher's. L_FFN of MLKD-BERT (Zhang, Yang, Ji 2024, arXiv 2407.02775). Our reading:
    mean, not sum, over the width.
    """
    assert student.hidden is not None and teacher.hidden is not None
    keep = student.mask.unsqueeze(-1)
    # Before the projection too: its weight's gradient is a product with what it was given.
    projected = projection(torch.where(keep, student.hidden, 0.0))
    target = torch.where(keep, teacher.hidden.detach(), 0.0)
    if projected.shape != target.shape:
        raise ValueError(
            f"hidden_mse: the student's hidden states come as {tuple(projected.shape)} and the "
            f"teacher's are {tuple(target.shape)}; project the student to the teacher's width."
        )
    wide = torch.promote_types(projected.dtype, torch.float32)
    gap = torch.where(keep, projected.to(wide) - target.to(wide), 0.0)
    return gap.square().mean(-1)
