"""How attention maps differ."""

import torch
from torch import Tensor

from mlkd_kernels.rows import drop_masked, widen
from mlkd_kernels.streamed.compiled import not_traced
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_mse import row_mse
from mlkd_kernels.streamed.tokens import token_limits


@not_traced
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
    vectors = _vectors(student_query, student_key, teacher_query, teacher_key, keep)
    limits = token_limits(keep, student_query.shape[1], causal, vectors[0].dtype)
    rows = row_kl(*vectors, (student_scale, teacher_scale), limits)
    return rows.view(student_query.shape[:3])


@not_traced
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
    vectors = _vectors(student_query, student_key, teacher_query, teacher_key, keep)
    shape = student_query.shape[:3]
    real = vectors[0].new_ones(shape[0], shape[2]) if keep is None else keep.to(vectors[0].dtype)
    keys = real.cumsum(1) if causal else real.sum(1, keepdim=True).expand_as(real)
    share = keys.clamp_min(1).reciprocal().repeat_interleave(shape[1], dim=0)
    return row_mse(*vectors, (student_scale, teacher_scale), share, causal).view(shape)


def _vectors(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    keep: Tensor | None,
) -> list[Tensor]:
    given = student_query, student_key, teacher_query.detach(), teacher_key.detach()
    flat = [_flat(x, keep) for x in given]
    dtype = torch.promote_types(flat[0].dtype, flat[2].dtype)
    return [x.to(dtype) for x in flat]


def _flat(x: Tensor, keep: Tensor | None) -> Tensor:  # [B, H, L, d] -> [B*H, L, d]
    x = widen(x) if keep is None else drop_masked(x, keep[:, None])
    return x.flatten(0, 1)
