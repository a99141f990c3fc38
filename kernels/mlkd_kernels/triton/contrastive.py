"""Contrastive loss of anchors from rows of scores, and its gradient: one program per anchor.

An anchor's row is [2, N] scores: with all students, then with all teachers. Which of them it sees
and which are its positives is found from masks and labels of samples, never kept as a matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkd_kernels.streamed.contrastive import ContrastOps, Partners
from mlkd_kernels.triton._common import LN_2, LOG2_E, MASKED
from mlkd_kernels.triton._launch import on_device
from mlkd_kernels.triton._tiles import row_tile


@triton.jit
def partners(keep_all, labels_all, at, inside, own, label, counts, itself: tl.constexpr):
    """Whether the anchor sees the samples `at`, and whether they are its positives."""
    same = at == own
    alike = same
    if labels_all is not None:
        others = tl.load(labels_all + at, mask=inside, other=-100)
        alike = same | ((others == label) & (label != -100))
    seen = inside & counts & (tl.load(keep_all + at, mask=inside, other=0) != 0)
    if itself:
        seen = seen & (at != own)
    return seen, seen & alike


@triton.jit(do_not_specialize=["first_row", "rows", "samples"])
def contrast(
    scores,
    grad,
    out,
    keep,
    keep_all,
    own,
    labels,
    labels_all,
    first_row,
    rows,
    samples,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With `grad` None the losses into `out`, else the gradient of the scores in their place."""
    row = tl.program_id(0)
    index = first_row + row
    counts = tl.load(keep + index) != 0
    here = tl.load(own + index)
    label = -100
    if labels is not None:
        label = tl.load(labels + index)
    largest = tl.full([], MASKED, tl.float32)
    spread = tl.full([], 0.0, tl.float32)
    pull = tl.full([], 0.0, tl.float32)
    positives = tl.full([], 0.0, tl.float32)
    for half in tl.static_range(2):
        line = scores + (half * rows + row).to(tl.int64) * samples
        for first in range(0, samples, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < samples
            seen, alike = partners(
                keep_all, labels_all, at, inside, here, label, counts, half == SIDE
            )
            x = tl.load(line + at, mask=inside, other=0.0) * LOG2_E
            pull += tl.sum(tl.where(alike, x, 0.0), 0)
            positives += tl.sum(alike.to(tl.float32), 0)
            x = tl.where(seen, x, MASKED)
            larger = tl.maximum(largest, tl.max(x, 0))
            spread = spread * tl.exp2(largest - larger) + tl.sum(tl.exp2(x - larger), 0)
            largest = larger
    # An anchor that sees nothing has no loss.
    real = largest > MASKED
    lse = largest + tl.log2(spread)
    share = 1.0 / tl.maximum(positives, 1.0)
    if grad is None:
        tl.store(out + row, tl.where(real, (lse - pull * share) * LN_2, 0.0))
    else:
        g = tl.where(real, tl.load(grad + row), 0.0)
        for half in tl.static_range(2):
            line = scores + (half * rows + row).to(tl.int64) * samples
            for first in range(0, samples, BLOCK):
                at = first + tl.arange(0, BLOCK)
                inside = at < samples
                seen, alike = partners(
                    keep_all, labels_all, at, inside, here, label, counts, half == SIDE
                )
                x = tl.load(line + at, mask=inside, other=0.0) * LOG2_E
                slope = tl.exp2(x - lse) - tl.where(alike, share, 0.0)
                tl.store(line + at, tl.where(seen, g * slope, 0.0), mask=inside)


def losses(scores: Tensor, found: Partners, side: int, rows: slice) -> Tensor:  # [2, r, N] -> [r]
    out = torch.empty(scores.shape[1], dtype=torch.float32, device=scores.device)
    _launch(scores, None, out, found, side, rows)
    return out


def slope(scores: Tensor, grad: Tensor, found: Partners, side: int, rows: slice) -> Tensor:
    _launch(scores, grad.contiguous(), None, found, side, rows)
    return scores


def _launch(
    scores: Tensor,
    grad: Tensor | None,
    out: Tensor | None,
    found: Partners,
    side: int,
    rows: slice,
) -> None:
    tile = row_tile(scores.shape[2])
    with on_device(scores):
        contrast[(scores.shape[1],)](
            scores, grad, out, found.keep, found.keep_all, found.own, found.labels,
            found.labels_all, rows.start, scores.shape[1], scores.shape[2], side,
            tile.block, num_warps=tile.warps,
        )  # fmt: skip


FUSED = ContrastOps(losses, slope)
