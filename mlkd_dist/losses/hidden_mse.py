"""Squared difference of hidden states."""

from collections.abc import Callable

from torch import Tensor

from mlkd_dist.losses._states import state_mse
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
    return state_mse("hidden_mse", student.hidden, teacher.hidden, student.mask, projection)
