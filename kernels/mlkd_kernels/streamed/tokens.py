"""Padding: real tokens are packed where that is cheap, others are masked."""

import torch
from torch import Tensor

from mlkd_kernels.streamed.blocks import on_cpu
from mlkd_kernels.streamed.row_ops import Limits

# Below this many scores a sequence costs less than packing it.
MIN_PACKED_SCORES = 2**14


def token_limits(keep: Tensor | None, heads: int, causal: bool, dtype: torch.dtype) -> Limits:
    """The limits of B * heads heads, those of a sequence side by side."""
    if keep is None:
        return Limits(causal=causal)
    if on_cpu(keep):
        if keep.all():
            return Limits(causal=causal)
        if heads * keep.shape[1] ** 2 >= MIN_PACKED_SCORES:
            return Limits(causal=causal, parts=_parts(keep, heads))
    dtype = torch.promote_types(dtype, torch.float32)
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    bias = bias.masked_fill_(~keep, torch.finfo(dtype).min)
    return Limits(bias.repeat_interleave(heads, dim=0), causal)


def of_heads(row_weight: Tensor, heads: int) -> Tensor:  # [B, L] -> [B * heads, L]
    return row_weight.repeat_interleave(heads, dim=0)


def _parts(keep: Tensor, heads: int) -> list[tuple[slice, Tensor]]:
    tokens = [row.nonzero().squeeze(1) for row in keep]
    return [(slice(b * heads, (b + 1) * heads), real) for b, real in enumerate(tokens)]
