"""KL of rows of scores that a matrix product has made, and its gradient: one program per row.

For vectors too wide for a kernel that makes the scores itself. Everything is computed in fp32 and
base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkd_kernels.streamed.blocks import Block, shaped
from mlkd_kernels.streamed.row_ops import Limits, RowOps
from mlkd_kernels.triton._common import LN_2, LOG2_E, MASKED
from mlkd_kernels.triton._launch import on_device
from mlkd_kernels.triton._tiles import row_tile


@triton.jit
def load_scores(line, first, columns, bias, seen, excluded, BLOCK: tl.constexpr):
    """Scores of the columns from `first` on, in base 2, MASKED where the row does not look."""
    at = first + tl.arange(0, BLOCK)
    allowed = at < tl.minimum(columns, seen)
    if bias is not None:
        allowed = allowed & (tl.load(bias + at, mask=at < columns, other=-1.0) == 0.0)
    if excluded is not None:
        allowed = allowed & (at != excluded)
    scores = tl.load(line + at, mask=allowed, other=0.0) * LOG2_E
    return tl.where(allowed, scores, MASKED), allowed


@triton.jit
def place(p, q, bias, rows, columns, heads_stride, start, excluded, CAUSAL: tl.constexpr):
    """The row of this program: its two lines of scores, its bias, and what it does not look at."""
    index = tl.program_id(0).to(tl.int64)
    row = start + (index % rows).to(tl.int32)
    if bias is not None:
        bias += index // rows * heads_stride
    if excluded is not None:
        excluded += row
    seen = columns
    if CAUSAL:
        seen = row + 1
    return p + index * columns, q + index * columns, bias, seen, excluded, index


@triton.jit
def nothing_seen():
    low = tl.full([], MASKED, tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    return low, zero, low, zero, zero


@triton.jit
def absorb(t, s, state):
    """Running maxima, sums and cross term of a row, the last one relative to both maxima."""
    t_max, t_sum, s_max, s_sum, cross = state
    new_t = tl.maximum(t_max, tl.max(t, 0))
    new_s = tl.maximum(s_max, tl.max(s, 0))
    t -= new_t
    s -= new_s
    t_power = tl.exp2(t)
    s_power = tl.exp2(s)
    shrink = tl.exp2(t_max - new_t)
    moved = (t_max - new_t) - (s_max - new_s)
    # A score of -inf has no power, and a gap that is no number.
    pull = tl.sum(tl.where(t_power > 0, t_power * (t - s), 0.0), 0)
    cross = shrink * (cross + t_sum * moved) + pull
    t_sum = shrink * t_sum + tl.sum(t_power, 0)
    s_sum = tl.exp2(s_max - new_s) * s_sum + tl.sum(s_power, 0)
    return new_t, t_sum, new_s, s_sum, cross


@triton.jit
def absorb_row(p, q, columns, bias, seen, excluded, BLOCK: tl.constexpr):
    state = nothing_seen()
    for first in range(0, seen, BLOCK):
        t, _ = load_scores(p, first, columns, bias, seen, excluded, BLOCK)
        s, _ = load_scores(q, first, columns, bias, seen, excluded, BLOCK)
        state = absorb(t, s, state)
    return state


@triton.jit(do_not_specialize=["rows", "columns", "start", "excluded"])
def kl_rows(
    p,
    q,
    bias,
    out,
    rows,
    columns,
    bias_head,
    start,
    excluded,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p, q, bias, seen, excluded, index = place(
        p, q, bias, rows, columns, bias_head, start, excluded, CAUSAL
    )
    t_max, t_sum, s_max, s_sum, cross = absorb_row(p, q, columns, bias, seen, excluded, BLOCK)
    tl.store(out + index, (cross / t_sum - tl.log2(t_sum) + tl.log2(s_sum)) * LN_2)


@triton.jit(do_not_specialize=["rows", "columns", "start", "excluded"])
def kl_slope(
    p,
    q,
    bias,
    grad,
    out,
    rows,
    columns,
    bias_head,
    start,
    excluded,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_j = grad (Q_j - P_j)"""
    p, q, bias, seen, excluded, index = place(
        p, q, bias, rows, columns, bias_head, start, excluded, CAUSAL
    )
    t_max, t_sum, s_max, s_sum, cross = absorb_row(p, q, columns, bias, seen, excluded, BLOCK)
    t_max += tl.log2(t_sum)
    s_max += tl.log2(s_sum)
    g = tl.load(grad + index)
    out += index * columns
    for first in range(0, columns, BLOCK):
        t, allowed = load_scores(p, first, columns, bias, seen, excluded, BLOCK)
        s, allowed = load_scores(q, first, columns, bias, seen, excluded, BLOCK)
        slope = tl.where(allowed, g * (tl.exp2(s - s_max) - tl.exp2(t - t_max)), 0.0)
        at = first + tl.arange(0, BLOCK)
        tl.store(out + at, slope.to(out.dtype.element_ty), mask=at < columns)


def kl(p: Tensor, q: Tensor, block: Block, limits: Limits) -> Tensor:  # [h, r, N] x 2 -> [h, r]
    out = torch.empty(block.shape[:2], dtype=torch.float32, device=p.device)
    _launch(kl_rows, p, q, (out,), block, limits)
    return out


def slope(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> Tensor:  # [h, r, N]
    # In a buffer of its own, of which 16 bits need the first half.
    out = shaped(block.buffers[2].view(dtype), *block.shape)
    _launch(kl_slope, p, q, (grad.contiguous(), out), block, limits)
    return out


def both(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return kl(p, q, block, limits), slope(p, q, grad, block, limits, dtype)


def _launch(
    kernel: triton.JITFunction,
    p: Tensor,
    q: Tensor,
    more: tuple[Tensor, ...],
    block: Block,
    limits: Limits,
) -> None:
    heads, rows, columns = block.shape
    bias = None if limits.bias is None else limits.bias[block.heads]
    tile = row_tile(columns)
    with on_device(p):
        kernel[(heads * rows,)](
            p, q, bias, *more, rows, columns, columns if bias is None else bias.stride(0),
            block.rows.start, limits.excluded, limits.causal,
            tile.block, num_warps=tile.warps,
        )  # fmt: skip


FUSED = RowOps(kl, slope, both)
