"""Divergences of two output heads in chunks of tokens, with the gradient made on the way."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.rows import full_precision, wide_type, zero_masked
from mlkd_kernels.streamed.blocks import on_cpu
from mlkd_kernels.streamed.divergence import KINDS, cross_entropy
from mlkd_kernels.streamed.products import add_product, factors, put_product

# Enough rows to keep the products thick; the buffers are the only memory that grows with V.
CPU_TOKENS = 128
MIN_CUDA_TOKENS = 1024
CUDA_BYTES = 3 * 2**30
# Entries: rows of logits begin where a device reads fastest.
CUDA_ALIGNMENT = 64
# A slope is at most some tens times its row's weight; in fp16 the largest weight becomes this.
FP16_WEIGHT = 2.0**9


class Head(NamedTuple):
    """logits = soft_cap tanh(scale <hidden, weight> / soft_cap) / temperature"""

    scale: float
    soft_cap: float | None
    temperature: float

    def put_products(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:  # [n, V]
        """Logits, or what the tanh of the soft cap is taken of."""
        put_product(out, hidden, weight.mT, self.scale / (self.soft_cap or self.temperature))

    @property
    def cap(self) -> float | None:
        """logits = cap tanh(product)"""
        return None if self.soft_cap is None else self.soft_cap / self.temperature


class Options(NamedTuple):
    kind: str
    beta: float
    row_weight: Tensor | None  # [N], 0 where a row does not count
    labels: Tensor | None  # [N]
    teacher_cap: float | None
    student_cap: float | None

    def of(self, rows: slice) -> "Options":
        weight, labels = (None if x is None else x[rows] for x in (self.row_weight, self.labels))
        return self._replace(row_weight=weight, labels=labels)


# products of teacher and student [n, V], a third buffer, options, whether gradients are wanted ->
# divergences [n], and the gradient by the student's products times the row weights, in the third
# buffer's type. May write over all three.
Divergences = Callable[[Tensor | None, Tensor, Tensor, Options, bool], tuple[Tensor, Tensor | None]]


def capped(student: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits of products, and their tanh where there is a cap; written over the products."""
    if cap is None:
        return student, None
    tanh = student.tanh_()
    return tanh * cap, tanh


def by_products(slope: Tensor, tanh: Tensor | None, row_weight: Tensor | None) -> Tensor:
    """The gradient by the products, of one by the logits, times its rows' weights; in place."""
    if tanh is not None:
        slope.addcmul_(slope, tanh.square_(), value=-1)
    return slope if row_weight is None else slope.mul_(row_weight.unsqueeze(-1))


def plain(
    teacher: Tensor | None, student: Tensor, spare: Tensor, options: Options, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    # It has the type of the student's factors, which may be 16 bits.
    spare = spare if spare.dtype == student.dtype else torch.empty_like(student)
    student, tanh = capped(student, options.student_cap)
    if teacher is None:
        rows, slope = cross_entropy(torch.log_softmax(student, -1, out=spare), options.labels)
    else:
        if options.teacher_cap is not None:
            teacher.tanh_().mul_(options.teacher_cap)
        log_p = torch.log_softmax(teacher, -1, out=spare)
        log_q = torch.log_softmax(student, -1, out=teacher)
        rows, slope = KINDS[options.kind](log_p, log_q, options.beta)
    if not with_slope:
        return rows, None
    return rows, by_products(slope(), tanh, options.row_weight)


def linear_divergence(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [N, E]
    teacher_weight: Tensor | None,  # [V, E]
    keep: Tensor | None,  # [N] bool, None where all rows count
    row_weight: Tensor | None,  # [N]
    labels: Tensor | None,  # [N]
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_scale: float,
    student_cap: float | None,
    teacher_scale: float,
    teacher_cap: float | None,
    divergences: Divergences = plain,
) -> Tensor:  # scalar
    if kind == "cross_entropy":
        teacher_hidden = teacher_weight = None
    else:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    rows = student_hidden, teacher_hidden, row_weight, labels
    if keep is not None:
        rows = _kept(keep, *rows)
    student_hidden, teacher_hidden, row_weight, labels = rows
    matrices = student_hidden, student_weight, teacher_hidden, teacher_weight
    weight = None if row_weight is None else row_weight.to(wide_type(*matrices))
    heads = (
        Head(student_scale, student_cap, temperature),
        Head(teacher_scale, teacher_cap, temperature),
    )
    options = Options(kind, beta, weight, labels, heads[1].cap, heads[0].cap)
    return in_chunks(*matrices, heads, options, divergences)


def in_chunks(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [N, E]
    teacher_weight: Tensor | None,  # [V, E]
    heads: tuple[Head, Head | None],
    options: Any,
    divergences: Divergences,
) -> Tensor:  # scalar
    """The sum over rows of what `divergences` makes of the products of a chunk of them, weighted,
    with its gradient. `options` is an Options or, as that, a named tuple of what belongs to rows,
    `row_weight` among it."""
    matrices = student_hidden, student_weight, teacher_hidden, teacher_weight
    # Inside a Function autograd does not say whether gradients are wanted at all.
    with_grad = torch.is_grad_enabled()
    return _LinearDivergence.apply(
        *matrices, wide_type(*matrices), heads, options, divergences, with_grad
    )


def _kept(
    keep: Tensor,
    hidden: Tensor,
    teacher: Tensor | None,
    weight: Tensor | None,
    labels: Tensor | None,
) -> list[Tensor | None]:
    """The rows that count; where their number would have to be waited for, zeros for the others."""
    given = hidden, teacher, weight, labels
    if on_cpu(keep):
        real = keep.nonzero().squeeze(1)
        return [None if x is None else x.index_select(0, real) for x in given]
    weight = keep.to(hidden.dtype) if weight is None else torch.where(keep, weight, 0)
    hidden, teacher = (None if x is None else zero_masked(x, keep) for x in (hidden, teacher))
    return [hidden, teacher, weight, labels]


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        wide: torch.dtype,
        heads: tuple[Head, Head],
        options: Options,
        divergences: Divergences,
        with_grad: bool,
    ) -> Tensor:  # scalar
        given = student_hidden, student_weight
        hidden, weight = factors(*given, wide)
        others = None if teacher_hidden is None else factors(teacher_hidden, teacher_weight, wide)
        grads = [
            torch.zeros_like(x, dtype=wide) if with_grad and needed else None
            for x, needed in zip(given, ctx.needs_input_grad[:2], strict=True)
        ]
        with_slope = any(grad is not None for grad in grads)
        total = student_hidden.new_zeros((), dtype=wide)
        options, unit = _in_units(options, hidden)
        with full_precision(total):
            for rows, buffers in _chunks(hidden, len(weight), wide):
                teacher = None
                if others is not None:
                    teacher = buffers[0]
                    heads[1].put_products(teacher, others[0][rows], others[1])
                heads[0].put_products(buffers[1], hidden[rows], weight)
                chunk = options.of(rows)
                values, slope = divergences(teacher, *buffers[1:], chunk, with_slope)
                part = chunk.row_weight
                total += values.sum() if part is None else torch.dot(values, part)
                if slope is not None:
                    _add_gradients(slope.to(hidden.dtype), heads[0], hidden, weight, rows, grads)
        if unit is not None:
            total, *grads = (None if x is None else x.mul_(unit) for x in (total, *grads))
        ctx.dtypes = [x.dtype for x in given]
        ctx.save_for_backward(*(_saved(x, to) for x, to in zip(grads, ctx.dtypes, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: there may be a second backward.
        found = [
            None if x is None else (x * grad.to(x.dtype)).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, *[None] * 7


def _saved(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # fp16 has no room for a gradient that the upstream one has not scaled yet.
    return grad if grad is None or dtype == torch.float16 else grad.to(dtype)


def _in_units(options: Options, hidden: Tensor) -> tuple[Options, Tensor | None]:
    """Row weights carry 1 / (number of rows): with them slopes of fp16 would vanish."""
    if hidden.dtype != torch.float16:
        return options, None
    weight = options.row_weight
    if weight is None:
        weight = torch.ones(len(hidden), dtype=torch.float32, device=hidden.device)
    largest = weight.abs().amax() if len(weight) else weight.new_ones(())
    unit = largest.clamp_min(torch.finfo(weight.dtype).tiny * FP16_WEIGHT) / FP16_WEIGHT
    return options._replace(row_weight=weight / unit), unit


def _add_gradients(
    slope: Tensor,  # [n, V]
    head: Head,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    rows: slice,
    grads: list[Tensor | None],
) -> None:
    scale = head.scale / head.temperature
    if grads[0] is not None:
        put_product(grads[0][rows], slope, weight, scale)
    if grads[1] is not None:
        add_product(grads[1], slope.mT, hidden[rows], scale)


def _chunks(
    hidden: Tensor, vocabulary: int, wide: torch.dtype
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows in chunks, and three buffers for them: two of logits and one, in the type of the
    student's factors, of their gradient."""
    tokens, width = CPU_TOKENS, vocabulary
    types = wide, wide, hidden.dtype
    if not on_cpu(hidden):
        width = -(-vocabulary // CUDA_ALIGNMENT) * CUDA_ALIGNMENT
        most = CUDA_BYTES // (sum(x.itemsize for x in types) * width)
        tokens = max(1 << max(most.bit_length() - 1, 0), MIN_CUDA_TOKENS)
    tokens = min(tokens, max(len(hidden), 1))
    buffers = [torch.empty(tokens, width, dtype=x, device=hidden.device) for x in types]
    for start in range(0, len(hidden), tokens):
        rows = slice(start, min(start + tokens, len(hidden)))
        yield rows, [buffer[: rows.stop - start, :vocabulary] for buffer in buffers]
