"""KL of rows of scores and its gradient, in plain PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mlkd_kernels.streamed.blocks import Block, shaped


class Limits(NamedTuple):
    """Which keys a row may look at. Vectors that do not count are 0 already."""

    bias: Tensor | None = None  # [H, N], 0 where a head sees a key, else the least number
    causal: bool = False
    # Row i does not look at key i + excluded.
    excluded: int | None = None
    # Heads with the tokens that are real there; None stands for all heads or all tokens.
    parts: list[tuple[slice, Tensor]] | None = None


class RowOps(NamedTuple):
    """What is done with the scores of a block. Both may write over them and over the buffers."""

    # teacher's and student's scores [h, r, N] -> KL(P || Q) [h, r]
    kl: Callable[[Tensor, Tensor, Block, Limits], Tensor]
    # the same and the gradient of the rows [h, r] -> gradient of the student's scores, in a dtype
    slope: Callable[[Tensor, Tensor, Tensor, Block, Limits, torch.dtype], Tensor]
    # both of them, with the arguments of `slope`
    both: Callable[[Tensor, Tensor, Tensor, Block, Limits, torch.dtype], tuple[Tensor, Tensor]]


def kl(p: Tensor, q: Tensor, block: Block, limits: Limits) -> Tensor:
    return _powers(p, q, block, limits)[0]


def both(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    value, (power, p_sum), (q, q_sum) = _powers(p, q, block, limits)
    # The same steps for both: of the same scores the slope is 0 to the bit.
    power.mul_((grad / p_sum).unsqueeze(-1))
    return value, q.mul_((grad / q_sum).unsqueeze(-1)).sub_(power).to(dtype)


def _powers(
    p: Tensor, q: Tensor, block: Block, limits: Limits
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The KL, and of teacher and student the powers with the sum of each row."""
    _restrict(p, block, limits)
    _restrict(q, block, limits)
    # The maximum goes first: the difference of two lse keeps its digits if neither is large.
    p.sub_(p.amax(-1, keepdim=True))
    q.sub_(q.amax(-1, keepdim=True))
    power = torch.exp(p, out=shaped(block.buffers[2], *block.shape))
    gap = p.sub_(q)
    p_sum, q_sum = power.sum(-1), q.exp_().sum(-1)
    value = gap.mul_(power).sum(-1) / p_sum + (q_sum / p_sum).log()
    return value, (power, p_sum), (q, q_sum)


def slope(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> Tensor:
    _restrict(p, block, limits)
    _restrict(q, block, limits)
    free = shaped(block.buffers[2], *block.shape)
    p, free = torch.softmax(p, -1, out=free), p
    q = torch.softmax(q, -1, out=free)
    return q.sub_(p).mul_(grad.unsqueeze(-1)).to(dtype)


def _restrict(scores: Tensor, block: Block, limits: Limits) -> None:
    least = torch.finfo(scores.dtype).min
    if limits.bias is not None:
        scores += limits.bias[block.heads, None, : block.columns]
    if limits.causal:
        scores[..., block.rows].masked_fill_(block.later(scores), least)
    if limits.excluded is not None:
        own = scores[..., block.rows.start + limits.excluded :]
        own.diagonal(dim1=-2, dim2=-1).fill_(least)


def squares(p: Tensor, q: Tensor, block: Block, limits: Limits) -> Tensor:
    """In place of the KL: the sum of (q - p)^2 over the keys that count."""
    return _gap(p, q, block, limits).square_().sum(-1)


def squares_slope(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> Tensor:
    return _gap(p, q, block, limits).mul_(2 * grad.unsqueeze(-1)).to(dtype)


def squares_both(
    p: Tensor, q: Tensor, grad: Tensor, block: Block, limits: Limits, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    gap = _gap(p, q, block, limits)
    value = torch.square(gap, out=shaped(block.buffers[2], *block.shape)).sum(-1)
    return value, gap.mul_(2 * grad.unsqueeze(-1)).to(dtype)


def _gap(p: Tensor, q: Tensor, block: Block, limits: Limits) -> Tensor:
    """q - p; a key that does not count has the score 0 in both, but for one that comes later."""
    gap = q.sub_(p)
    if limits.causal:
        gap[..., block.rows].masked_fill_(block.later(gap), 0)
    return gap


PLAIN = RowOps(kl, slope, both)
SQUARES = RowOps(squares, squares_slope, squares_both)
