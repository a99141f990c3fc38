"""The direction of one vector per sample, layer by layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mlkd_dist.trace import Layer
from mlkd_kernels.rows import widen

ROWS = "sample"
SCOPE = "layer"
READS = ("cls", "mean", "last")
TEACHER = True
PROJECTION = True


def cls_cosine(
    student: Layer, teacher: Layer, projection: Callable[[Tensor], Tensor], *, of: str = "cls"
) -> Tensor:  # [B]
    """1 - cos(projection(c), t), c and t one vector of the layers' outputs: `of` names which.

    c is the student's, t the teacher's: of the first token (cls), the mean over tokens, or of the
    last token, which is what a decoder has read everything by. 0 where a sample has no token.
    Raises ValueError where the projected width is not the teacher's. Aguilar et al. 2020 (arXiv
    1910.03723), who have models of one width; our reading: else a learned projection.
    """
    ours, theirs = getattr(student, of), getattr(teacher, of)
    assert ours is not None and theirs is not None, of
    keep = student.mask.any(1, keepdim=True)
    projected = projection(torch.where(keep, ours, 0.0))
    target = torch.where(keep, theirs.detach(), 0.0)
    if projected.shape != target.shape:
        raise ValueError(
            f"cls_cosine: the student's vectors come as {tuple(projected.shape)} and the teacher's "
            f"are {tuple(target.shape)}; project the student to the teacher's width."
        )
    units = [F.normalize(widen(x), dim=-1) for x in (projected, target)]
    # Of unit vectors 1 - cos is half the squared distance, which is exactly 0 where they agree.
    gap = torch.where(keep, units[0] - units[1], 0.0)
    return gap.square().sum(-1) / 2
