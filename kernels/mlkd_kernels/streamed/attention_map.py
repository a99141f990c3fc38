"""KL between attention maps."""

from torch import Tensor

from mlkd_kernels.rows import zero_masked
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.tokens import token_limits


def attention_kl(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, H, L]
    given = student_query, student_key, teacher_query.detach(), teacher_key.detach()
    vectors = [_flat(x, keep) for x in given]
    limits = token_limits(keep, student_query.shape[1], causal, vectors[0].dtype)
    rows = row_kl(*vectors, (student_scale, teacher_scale), limits)
    return rows.view(student_query.shape[:3])


def _flat(x: Tensor, keep: Tensor | None) -> Tensor:  # [B, H, L, d] -> [B*H, L, d]
    x = x if keep is None else zero_masked(x, keep[:, None])
    return x.flatten(0, 1)
