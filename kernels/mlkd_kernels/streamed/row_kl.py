"""KL between two softmaxes of inner products: what relations, attention and samples share."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.rows import full_precision, wide_type
from mlkd_kernels.streamed.blocks import Block, blocks, is_small, on_cpu, shaped
from mlkd_kernels.streamed.products import add_product, factors, multiplies_16_bits, put_product
from mlkd_kernels.streamed.row_ops import PLAIN, Limits, RowOps

# Half of fp16's range: what a kernel of 16 bits may make of the largest upstream gradient.
FP16_ROOM = 2.0**12


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

    def scores(self, block: Block, buffer: Tensor) -> Tensor:  # -> [h, r, N]
        query, key = self.rows(block), self.key[self.key_heads(block.heads), : block.columns]
        flat = shaped(buffer, len(key), query.shape[1], block.columns)
        put_product(flat, query, key.mT, self.scale)
        return flat.view(block.shape)


def row_kl(
    student_query: Tensor,  # [H, M, ds]
    student_key: Tensor | None,  # [Hkv, N, ds], None where the queries are the keys
    teacher_query: Tensor,  # [H, M, dt]
    teacher_key: Tensor | None,  # [Hkv', N, dt]
    scales: tuple[float, float],  # student's, teacher's
    limits: Limits,
    ops: RowOps = PLAIN,
    row_weight: Tensor | None = None,  # [H, M]
) -> Tensor:  # [H, M], or a scalar
    """KL(P_i || Q_i), P_i = softmax_j(scale <query_i, key_j>), Q_i the student's likewise; with
    weights the sum over all rows, whose gradient is made in the forward pass."""
    vectors = [student_query, student_key, teacher_query, teacher_key]
    wide = wide_type(*vectors)
    for i in (0, 2):
        query, key = vectors[i : i + 2]
        query, found = factors(query, query if key is None else key, wide)
        vectors[i : i + 2] = query, None if key is None else found
    if row_weight is not None:
        if not torch.is_grad_enabled():
            vectors = [None if x is None else x.detach() for x in vectors]
        return _SumKL.apply(*vectors, row_weight.detach().to(wide), scales, limits, ops)
    return _RowKL.apply(*vectors, wide, scales, limits, ops)


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        student_key: Tensor | None,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        wide: torch.dtype,
        scales: tuple[float, float],
        limits: Limits,
        ops: RowOps,
    ) -> Tensor:
        # The scores are made again in backward, and their softmax with them: no statistics. Of few
        # scores the slopes are kept instead.
        vectors = student_query, student_key, teacher_query, teacher_key
        sides = _sides(vectors, scales)
        keeps = any(ctx.needs_input_grad[:2]) and _keeping_is_cheaper(sides[0])
        slopes: list[Tensor] | None = [] if keeps else None
        rows = _values(*sides, limits, ops, wide, slopes)
        ctx.save_for_backward(*vectors, *(slopes or []))
        ctx.scales, ctx.limits, ctx.ops = scales, limits, ops
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vectors, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        sides, slopes = _sides(vectors, ctx.scales), iter(kept) if kept else None
        needed = ctx.needs_input_grad
        grads = _gradients(*sides, ctx.limits, ctx.ops, grad, needed, slopes=slopes)
        dtype = sides[0].query.dtype
        return *(None if x is None else x.to(dtype) for x in grads), *[None] * 6


class _SumKL(torch.autograd.Function):
    """The weights are known, so that one pass makes the scores, and of them all that is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        student_key: Tensor | None,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        row_weight: Tensor,
        scales: tuple[float, float],
        limits: Limits,
        ops: RowOps,
    ) -> Tensor:
        sides = _sides((student_query, student_key, teacher_query, teacher_key), scales)
        needed, ctx.dtype = ctx.needs_input_grad, student_query.dtype
        if any(needed[:2]):
            rows = torch.zeros_like(row_weight)
            ctx.save_for_backward(*_gradients(*sides, limits, ops, row_weight, needed, rows))
        else:
            rows = _values(*sides, limits, ops, row_weight.dtype)
        return (torch.where(row_weight != 0, rows, 0.0) * row_weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if x is None else (x * grad).to(ctx.dtype) for x in ctx.saved_tensors]
        return *found, *[None] * 6


def _values(
    student: Side,
    teacher: Side,
    limits: Limits,
    ops: RowOps,
    wide: torch.dtype,
    slopes: list[Tensor] | None = None,
) -> Tensor:  # [H, M]
    """Where there are `slopes`, these get each block's gradient of the student's scores."""
    rows = student.query.new_zeros(student.query.shape[:2], dtype=wide)
    with full_precision(rows):
        for heads, tokens in _parts(limits, rows):
            found, own = _take(rows[heads], tokens), _of_part(limits, heads)
            sides = student.part(heads, tokens), teacher.part(heads, tokens)
            for block in _blocks(*sides, own, found):
                p = sides[1].scores(block, block.buffers[0])
                q = sides[0].scores(block, block.buffers[1])
                if slopes is None:
                    found[block.heads, block.rows] = ops.kl(p, q, block, own)
                    continue
                one = rows.new_ones(block.shape[:2])
                found[block.heads, block.rows], slope = ops.both(p, q, one, block, own, wide)
                slopes.append(slope.clone())
            _put(rows[heads], tokens, found)
    return rows


def _gradients(
    student: Side,
    teacher: Side,
    limits: Limits,
    ops: RowOps,
    grad: Tensor,  # [H, M]
    needed: tuple[bool, ...],
    rows: Tensor | None = None,  # [H, M]
    slopes: Iterator[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of the student's queries and keys, wide; None where they are not needed, or the keys are the
    queries. Where there are `rows`, these get the values; `slopes` are those of `_values`."""
    grad, unit = _in_units(grad, student.key)
    as_query = torch.zeros_like(student.query, dtype=grad.dtype) if needed[0] else None
    as_key = as_query
    if student.key is not student.query:
        as_key = torch.zeros_like(student.key, dtype=grad.dtype) if needed[1] else None
    with full_precision(grad):
        for heads, tokens in _parts(limits, grad):
            side = student.part(heads, tokens)
            wholes = _slice(as_query, heads), _slice(as_key, student.key_heads(heads))
            found = [None if x is None else _take(x, tokens) for x in wholes]
            if as_key is as_query:
                found[1] = found[0]
            upstream, own = _take(grad[heads], tokens), _of_part(limits, heads)
            values = None if rows is None else _take(rows[heads], tokens)
            other = teacher.part(heads, tokens)
            _add(side, other, own, ops, upstream, *found, values, slopes)
            for whole, part in zip(wholes, found, strict=True):
                _put(whole, tokens, part)
            _put(_slice(rows, heads), tokens, values)
    grads = as_query, None if as_key is as_query else as_key
    return tuple(x if x is None or unit is None else x.mul_(unit) for x in grads)


def _add(
    student: Side,
    teacher: Side,
    limits: Limits,
    ops: RowOps,
    grad: Tensor,  # [H, M]
    as_query: Tensor | None,  # [H, M, ds]
    as_key: Tensor | None,  # [Hkv, N, ds]
    rows: Tensor | None,  # [H, M]
    slopes: Iterator[Tensor] | None,
) -> None:
    """Adds the gradients; a vector that is query and key gets both in the same tensor."""
    for block in _blocks(student, teacher, limits, grad):
        upstream = grad[block.heads, block.rows]
        if slopes is None:
            p = teacher.scores(block, block.buffers[0])
            q = student.scores(block, block.buffers[1])
            given = p, q, upstream, block, limits, student.key.dtype
            if rows is None:
                slope = ops.slope(*given)
            else:
                rows[block.heads, block.rows], slope = ops.both(*given)
        else:
            free = shaped(block.buffers[0], *block.shape)
            slope = torch.mul(next(slopes), upstream.unsqueeze(-1), out=free)
            slope = slope.to(student.key.dtype)
        keys = student.key_heads(block.heads)
        flat = slope.view(keys.stop - keys.start, -1, block.columns)
        if as_query is not None:
            key = student.key[keys, : block.columns]
            found = grad.new_empty(*flat.shape[:2], key.shape[2])
            put_product(found, flat, key, student.scale)
            part = as_query[block.heads, block.rows]
            part += found.view(part.shape)
        if as_key is not None:
            part = as_key[keys, : block.columns]
            add_product(part, flat.mT, student.rows(block), student.scale)


def _in_units(grad: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """The upstream gradient and the unit it is in, None for 1.

    It carries 1 / (number of rows): in fp16 its products with Q - P would vanish.
    """
    if not (multiplies_16_bits(key) and key.dtype == torch.float16):
        return grad, None
    unit = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny) / FP16_ROOM
    return grad / unit, unit


def _keeping_is_cheaper(student: Side) -> bool:
    heads, rows = student.query.shape[:2]
    return on_cpu(student.query) and is_small(heads * rows, student.key.shape[1])


def _blocks(student: Side, teacher: Side, limits: Limits, like: Tensor) -> Iterator[Block]:
    heads, rows = student.query.shape[:2]
    step = math.lcm(student.share, teacher.share)
    return blocks(like, heads, step, rows, student.key.shape[1], limits.causal)


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
