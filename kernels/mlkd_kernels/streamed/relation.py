"""KL between token-to-token relations."""

from torch import Tensor

from mlkd_kernels.rows import zero_masked
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_ops import PLAIN, RowOps
from mlkd_kernels.streamed.tokens import token_limits


def relation_kl(
    student: Tensor,  # [B, L, R*ds]
    teacher: Tensor,  # [B, L, R*dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    heads: int,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    ops: RowOps = PLAIN,
) -> Tensor:  # [B, R, L]
    batch, length = student.shape[:2]
    student, teacher = (_split(x, keep, heads) for x in (student, teacher))
    limits = token_limits(keep, heads, causal, student.dtype)
    rows = row_kl(
        student, None, teacher.detach(), None, (student_scale, teacher_scale), limits, ops
    )
    return rows.view(batch, heads, length)


def _split(x: Tensor, keep: Tensor | None, heads: int) -> Tensor:  # [B, L, R*d] -> [B*R, L, d]
    x = x if keep is None else zero_masked(x, keep)
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2).flatten(0, 1)
