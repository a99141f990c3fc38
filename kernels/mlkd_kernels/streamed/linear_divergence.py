"""Divergences of two output heads in chunks of tokens, with the gradient made on the way."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.rows import drop_masked, full_precision
from mlkd_kernels.streamed.blocks import on_cpu, shaped
from mlkd_kernels.streamed.compiled import not_traced
from mlkd_kernels.streamed.divergence import KINDS, Slope, cross_entropy

# Enough rows to keep the products thick; the buffers are the only memory that grows with V.
CPU_TOKENS = 128
MIN_CUDA_TOKENS = 1024
CUDA_BYTES = 2**31


class Head(NamedTuple):
    """logits = soft_cap tanh(scale <hidden, weight> / soft_cap) / temperature"""

    scale: float
    soft_cap: float | None
    temperature: float

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:  # -> [n, V]
        scale = self.scale / (self.soft_cap or self.temperature)
        torch.addmm(out, hidden, weight.mT, beta=0, alpha=scale, out=out)
        if self.soft_cap is not None:
            out.tanh_().mul_(self.soft_cap / self.temperature)
        return out

    def through(self, slope: Tensor, logits: Tensor) -> Tensor:  # [n, V] twice -> [n, V]
        """From the gradient by the logits to that by the inner products. Writes over both."""
        if self.soft_cap is not None:
            tanh = logits.mul_(self.temperature / self.soft_cap)
            slope.addcmul_(slope, tanh.square_(), value=-1)
        return slope


class Options(NamedTuple):
    kind: str
    beta: float
    row_weight: Tensor | None  # [N], 0 where a row does not count
    labels: Tensor | None  # [N]
    # Inside a Function autograd does not say whether gradients are wanted at all.
    with_grad: bool


@not_traced
def linear_divergence(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [N, E]
    teacher_weight: Tensor | None,  # [V, E]
    keep: Tensor | None,  # [N] bool, None where all rows count
    *,
    kind: str,
    beta: float,
    row_weight: Tensor | None,  # [N]
    labels: Tensor | None,  # [N]
    student_head: Head,
    teacher_head: Head,
) -> Tensor:  # scalar
    rows = student_hidden, teacher_hidden, row_weight, labels
    if keep is not None:
        rows = _kept(keep, *rows)
    student_hidden, teacher_hidden, row_weight, labels = rows
    options = Options(kind, beta, row_weight, labels, torch.is_grad_enabled())
    matrices = [student_hidden, student_weight, None, None]
    if kind != "cross_entropy":
        matrices[2:] = teacher_hidden.detach(), teacher_weight.detach()
    dtype = torch.float32
    for x in matrices:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    matrices = [None if x is None else x.to(dtype) for x in matrices]
    if row_weight is not None:
        options = options._replace(row_weight=row_weight.to(dtype))
    return _LinearDivergence.apply(*matrices, (student_head, teacher_head), options)


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
    hidden, teacher = (None if x is None else drop_masked(x, keep) for x in (hidden, teacher))
    return [hidden, teacher, weight, labels]


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        heads: tuple[Head, Head],
        options: Options,
    ) -> Tensor:  # scalar
        weights = student_weight, teacher_weight
        grads = [
            torch.zeros_like(x) if options.with_grad and needed else None
            for x, needed in zip(
                (student_hidden, student_weight), ctx.needs_input_grad[:2], strict=True
            )
        ]
        total = student_hidden.new_zeros(())
        with full_precision(total):
            for rows, buffers in _chunks(student_hidden, len(student_weight)):
                chunk = [None if x is None else x[rows] for x in (student_hidden, teacher_hidden)]
                values, slope = _chunk(*chunk, *weights, heads, options, rows, buffers)
                weight = None if options.row_weight is None else options.row_weight[rows]
                total += values.sum() if weight is None else torch.dot(values, weight)
                if any(grad is not None for grad in grads):
                    found = heads[0].through(slope(), buffers[0])
                    if weight is not None:
                        found.mul_(weight.unsqueeze(-1))
                    _add_gradients(found, heads[0], chunk[0], student_weight, rows, grads)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: there may be a second backward.
        found = [None if x is None else x * grad for x in ctx.saved_tensors]
        return *found, None, None, None, None


def _chunk(
    student_hidden: Tensor,  # [n, D]
    teacher_hidden: Tensor | None,  # [n, E]
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    heads: tuple[Head, Head],
    options: Options,
    rows: slice,
    buffers: list[Tensor],  # [n, V] each
) -> tuple[Tensor, Slope]:
    """The divergences of a chunk and what makes their gradient. Leaves the student's logits in the
    first buffer."""
    if teacher_hidden is not None:
        logits = heads[1].logits(teacher_hidden, teacher_weight, buffers[0])
        log_p = torch.log_softmax(logits, -1, out=buffers[1])
    logits = heads[0].logits(student_hidden, student_weight, buffers[0])
    log_q = torch.log_softmax(logits, -1, out=buffers[2])
    if teacher_hidden is None:
        return cross_entropy(log_q, options.labels[rows])
    return KINDS[options.kind](log_p, log_q, options.beta)


def _add_gradients(
    slope: Tensor,  # [n, V]
    head: Head,
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    rows: slice,
    grads: list[Tensor | None],
) -> None:
    scale = head.scale / head.temperature
    if grads[0] is not None:
        out = grads[0][rows]
        torch.addmm(out, slope, weight, beta=0, alpha=scale, out=out)
    if grads[1] is not None:
        grads[1].addmm_(slope.mT, hidden, alpha=scale)


def _chunks(like: Tensor, vocabulary: int) -> Iterator[tuple[slice, list[Tensor]]]:
    tokens = CPU_TOKENS
    if not on_cpu(like):
        # Three buffers and what a divergence adds to them.
        most = CUDA_BYTES // (5 * like.element_size() * vocabulary)
        tokens = max(1 << max(most.bit_length() - 1, 0), MIN_CUDA_TOKENS)
    tokens = min(tokens, max(len(like), 1))
    buffers = [like.new_empty(tokens * vocabulary) for _ in range(3)]
    for start in range(0, len(like), tokens):
        rows = slice(start, min(start + tokens, len(like)))
        yield rows, [shaped(buffer, rows.stop - start, vocabulary) for buffer in buffers]
