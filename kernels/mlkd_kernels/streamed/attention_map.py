"""How attention maps differ."""

import torch
from torch import Tensor

from mlkd_kernels.rows import wide_type, zero_masked
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_ops import PLAIN, SQUARES, RowOps
from mlkd_kernels.streamed.tokens import of_heads, token_limits


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
    row_weight: Tensor | None = None,  # [B, L]
    ops: RowOps = PLAIN,
) -> Tensor:  # [B, H, L], or a scalar
    given = student_query, student_key, teacher_query.detach(), teacher_key.detach()
    vectors = [_flat(x, keep) for x in given]
    limits = token_limits(keep, student_query.shape[1], causal, vectors[0].dtype)
    scales = student_scale, teacher_scale
    if row_weight is not None:
        row_weight = of_heads(row_weight, student_query.shape[1])
        return row_kl(*vectors, scales, limits, ops, row_weight)
    return row_kl(*vectors, scales, limits, ops).view(student_query.shape[:3])


def attention_mse(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    row_weight: Tensor | None = None,  # [B, L]
) -> Tensor:  # [B, H, L], or a scalar
    vectors = [student_query, student_key, teacher_query, teacher_key]
    # Unlike Q - P the gap of two scores knows no bound, and fp16 a low one.
    vectors = [x.float() if x.dtype == torch.float16 else x for x in vectors]
    scales = {"student_scale": student_scale, "teacher_scale": teacher_scale}
    wide, (batch, _, length, _) = wide_type(*vectors), student_query.shape
    real = student_query.new_ones(batch, length, dtype=wide) if keep is None else keep.to(wide)
    keys = (real.cumsum(1) if causal else real.sum(1, keepdim=True)).clamp_min(1)
    options = {"causal": causal, **scales, "ops": SQUARES}
    if row_weight is not None:
        return attention_kl(*vectors, keep, **options, row_weight=row_weight / keys)
    return attention_kl(*vectors, keep, **options) / keys.unsqueeze(1)


def _flat(x: Tensor, keep: Tensor | None) -> Tensor:  # [B, H, L, d] -> [B*H, L, d]
    x = x if keep is None else zero_masked(x, keep[:, None])
    return x.flatten(0, 1)
