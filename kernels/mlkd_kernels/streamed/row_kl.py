"""KL between two softmaxes of inner products: what relations, attention and samples share."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.streamed.blocks import Block, blocks, full_precision, shaped


class Limits(NamedTuple):
    """Which keys a row may look at. Vectors that do not count are 0 already."""

    bias: Tensor | None = None  # [H, N], added to the scores of a head's keys
    causal: bool = False
    # Row i does not look at key i + excluded.
    excluded: int | None = None
    # Heads with the tokens that are real there; None stands for all heads or all tokens.
    parts: list[tuple[slice, Tensor]] | None = None


class Side(NamedTuple):
    """One model's vectors. Query head h reads key head h // (H / Hkv)."""

    query: Tensor  # [H, M, d]
    key: Tensor  # [Hkv, N, d]
    scale: float

    @property
    def share(self) -> int:
        return len(self.query) // len(self.key)

    def key_heads(self, heads: slice) -> slice:
        return slice(heads.start // self.share, heads.stop // self.share)

    def part(self, heads: slice, tokens: Tensor | None) -> "Side":
        query = _take(self.query[heads], tokens)
        if self.key is self.query:
            return Side(query, query, self.scale)
        return Side(query, _take(self.key[self.key_heads(heads)], tokens), self.scale)

    def rows(self, block: Block) -> Tensor:  # -> [h / share, share * r, d]
        """The queries of one key head below each other, so that no key is repeated."""
        query = self.query[block.heads, block.rows]
        return query.reshape(-1, self.share * query.shape[1], query.shape[2])

    def scores(self, block: Block, limits: Limits, buffer: Tensor) -> Tensor:  # -> [h, r, N]
        query, key = self.rows(block), self.key[self.key_heads(block.heads), : block.columns]
        flat = shaped(buffer, len(key), query.shape[1], block.columns)
        torch.baddbmm(flat, query, key.mT, beta=0, alpha=self.scale, out=flat)
        scores = flat.view(block.shape)
        if limits.bias is not None:
            scores += limits.bias[block.heads, None, : block.columns]
        if limits.causal:
            scores[..., block.rows].masked_fill_(block.later(flat), torch.finfo(flat.dtype).min)
        if limits.excluded is not None:
            own = scores[..., block.rows.start + limits.excluded :]
            own.diagonal(dim1=-2, dim2=-1).fill_(torch.finfo(flat.dtype).min)
        return scores


def row_kl(
    student_query: Tensor,  # [H, M, ds]
    student_key: Tensor | None,  # [Hkv, N, ds], None where the queries are the keys
    teacher_query: Tensor,  # [H, M, dt]
    teacher_key: Tensor | None,  # [Hkv', N, dt]
    scales: tuple[float, float],  # student's, teacher's
    limits: Limits,
) -> Tensor:  # [H, M]
    """KL(P_i || Q_i), P_i = softmax_j(scale <query_i, key_j>), Q_i the student's likewise."""
    vectors = student_query, student_key, teacher_query, teacher_key
    dtype = torch.promote_types(student_query.dtype, teacher_query.dtype)
    vectors = [None if x is None else x.to(dtype) for x in vectors]
    return _RowKL.apply(*vectors, scales, limits)


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        student_key: Tensor | None,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        scales: tuple[float, float],
        limits: Limits,
    ) -> Tensor:
        # The scores are made again in backward, and their softmax with them: no statistics.
        vectors = student_query, student_key, teacher_query, teacher_key
        ctx.save_for_backward(*vectors)
        ctx.scales, ctx.limits = scales, limits
        student, teacher = _sides(vectors, scales)
        rows = student_query.new_zeros(student_query.shape[:2])
        with full_precision(rows):
            for heads, tokens in _parts(limits, rows):
                found = _take(rows[heads], tokens)
                sides = student.part(heads, tokens), teacher.part(heads, tokens)
                _forward(*sides, _of_part(limits, heads), found)
                _put(rows[heads], tokens, found)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = _sides(ctx.saved_tensors, ctx.scales)
        as_query = torch.zeros_like(student.query) if ctx.needs_input_grad[0] else None
        as_key = as_query
        if student.key is not student.query:
            as_key = torch.zeros_like(student.key) if ctx.needs_input_grad[1] else None
        with full_precision(grad):
            for heads, tokens in _parts(ctx.limits, grad):
                side = student.part(heads, tokens)
                wholes = _slice(as_query, heads), _slice(as_key, student.key_heads(heads))
                found = [None if x is None else _take(x, tokens) for x in wholes]
                if as_key is as_query:
                    found[1] = found[0]
                upstream = _take(grad[heads], tokens)
                limits = _of_part(ctx.limits, heads)
                _backward(side, teacher.part(heads, tokens), limits, upstream, *found)
                for whole, part in zip(wholes, found, strict=True):
                    _put(whole, tokens, part)
        return as_query, None if as_key is as_query else as_key, None, None, None, None


def _forward(student: Side, teacher: Side, limits: Limits, out: Tensor) -> None:
    for block in _blocks(student, teacher, limits):
        p = teacher.scores(block, limits, block.buffers[0])
        q = student.scores(block, limits, block.buffers[1])
        # The maximum goes first: the difference of two lse keeps its digits if neither is large.
        p.sub_(p.amax(-1, keepdim=True))
        q.sub_(q.amax(-1, keepdim=True))
        power = torch.exp(p, out=shaped(block.buffers[2], *block.shape))
        gap = p.sub_(q)
        p_sum, q_sum = power.sum(-1), q.exp_().sum(-1)
        pull = power.mul_(gap).sum(-1) / p_sum
        torch.add(pull, (q_sum / p_sum).log(), out=out[block.heads, block.rows])


def _backward(
    student: Side,
    teacher: Side,
    limits: Limits,
    grad: Tensor,  # [H, M]
    as_query: Tensor | None,  # [H, M, ds]
    as_key: Tensor | None,  # [Hkv, N, ds]
) -> None:
    """Adds the gradients; a vector that is query and key gets both in the same tensor."""
    weight = (grad * student.scale).unsqueeze(-1)
    for block in _blocks(student, teacher, limits):
        free = shaped(block.buffers[2], *block.shape)
        p = torch.softmax(teacher.scores(block, limits, block.buffers[0]), -1, out=free)
        scores = student.scores(block, limits, block.buffers[1])
        q = torch.softmax(scores, -1, out=shaped(block.buffers[0], *block.shape))
        q.sub_(p).mul_(weight[block.heads, block.rows])
        keys = student.key_heads(block.heads)
        flat = q.view(keys.stop - keys.start, -1, block.columns)
        if as_query is not None:
            found = torch.bmm(flat, student.key[keys, : block.columns])
            rows = as_query[block.heads, block.rows]
            rows += found.view(rows.shape)
        if as_key is not None:
            as_key[keys, : block.columns].baddbmm_(flat.mT, student.rows(block))


def _blocks(student: Side, teacher: Side, limits: Limits) -> Iterator[Block]:
    heads, rows = student.query.shape[:2]
    step = math.lcm(student.share, teacher.share)
    return blocks(student.query, heads, step, rows, student.key.shape[1], limits.causal)


def _sides(vectors: tuple[Tensor | None, ...], scales: tuple[float, float]) -> list[Side]:
    pairs = zip(vectors[::2], vectors[1::2], scales, strict=True)
    return [Side(query, query if key is None else key, scale) for query, key, scale in pairs]


def _parts(limits: Limits, rows: Tensor) -> list[tuple[slice, Tensor | None]]:
    return [(slice(0, len(rows)), None)] if limits.parts is None else limits.parts


def _of_part(limits: Limits, heads: slice) -> Limits:
    return limits._replace(bias=_slice(limits.bias, heads), parts=None)


def _slice(x: Tensor | None, heads: slice) -> Tensor | None:
    return None if x is None else x[heads]


def _take(x: Tensor, tokens: Tensor | None) -> Tensor:  # [H, L, ...] -> [H, n, ...]
    return x if tokens is None else x.index_select(1, tokens)


def _put(whole: Tensor | None, tokens: Tensor | None, part: Tensor | None) -> None:
    if whole is not None and tokens is not None:
        whole.index_copy_(1, tokens, part)
