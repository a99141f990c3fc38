"""How attention maps differ."""

import torch
from torch import Tensor

from mlkd_kernels.rows import wide_type, zero_masked
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_ops import PLAIN, SQUARES, RowOps
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
    ops: RowOps = PLAIN,
) -> Tensor:  # [B, H, L]
    given = student_query, student_key, teacher_query.detach(), teacher_key.detach()
    vectors = [_flat(x, keep) for x in given]
    limits = token_limits(keep, student_query.shape[1], causal, vectors[0].dtype)
    rows = row_kl(*vectors, (student_scale, teacher_scale), limits, ops)
    return rows.view(student_query.shape[:3])


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
) -> Tensor:  # [B, H, L]
    vectors = [student_query, student_key, teacher_query, teacher_key]
    # Unlike Q - P the gap of two scores knows no bound, and fp16 a low one.
    vectors = [x.float() if x.dtype == torch.float16 else x for x in vectors]
    scales = {"student_scale": student_scale, "teacher_scale": teacher_scale}
    sums = attention_kl(*vectors, keep, causal=causal, **scales, ops=SQUARES)
    wide = wide_type(*vectors)
    real = sums.new_ones(sums.shape[0], sums.shape[2]) if keep is None else keep.to(wide)
    keys = real.cumsum(1) if causal else real.sum(1, keepdim=True)
    return sums / keys.clamp_min(1).unsqueeze(1)


def _flat(x: Tensor, keep: Tensor | None) -> Tensor:  # [B, H, L, d] -> [B*H, L, d]
    x = x if keep is None else zero_masked(x, keep[:, None])
    return x.flatten(0, 1)
