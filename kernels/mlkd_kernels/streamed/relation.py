"""KL between token-to-token relations."""

from torch import Tensor

from mlkd_kernels.rows import zero_masked
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_ops import PLAIN, RowOps
from mlkd_kernels.streamed.tokens import of_heads, token_limits


def relation_kl(
    student: Tensor,  # [B, L, R*ds]
    teacher: Tensor,  # [B, L, R*dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    heads: int,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    row_weight: Tensor | None = None,  # [B, L]
    ops: RowOps = PLAIN,
) -> Tensor:  # [B, R, L], or a scalar
    batch, length = student.shape[:2]
    student, teacher = (_split(x, keep, heads) for x in (student, teacher))
    limits = token_limits(keep, heads, causal, student.dtype)
    scales = student_scale, teacher_scale
    vectors = student, None, teacher.detach(), None
    if row_weight is not None:
        return row_kl(*vectors, scales, limits, ops, of_heads(row_weight, heads))
    return row_kl(*vectors, scales, limits, ops).view(batch, heads, length)


def _split(x: Tensor, keep: Tensor | None, heads: int) -> Tensor:  # [B, L, R*d] -> [B*R, L, d]
    x = x if keep is None else zero_masked(x, keep)
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2).flatten(0, 1)
