"""What else computes the same: written as one would without this package, and other packages."""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNKS = 8


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled when it is first called: torch's compiler alone takes seconds to import."""

    @functools.cache
    def made() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False)

    return lambda *given: made()(*given)


def autocast(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """As a training loop in 16 bit calls it; the backward runs in the types of the forward."""
    if dtype == torch.float32:
        return function

    def run(*given: Tensor) -> Tensor:
        with torch.autocast(given[0].device.type, dtype):
            return function(*given)

    return run


def score_kl(teacher: Tensor, student: Tensor, causal: bool = False) -> Tensor:
    """KL of the softmaxes of two matrices of scores, row by row."""
    if causal:
        later = torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device).triu(1)
        teacher, student = (
            x.masked_fill(later, torch.finfo(x.dtype).min) for x in (teacher, student)
        )
    p, q = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def in_chunks(
    function: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """A compiled sum over rows, eight times an eighth of them, whose logits are made again in the
    backward. Arguments: rows, weight, rows, weight."""
    chunk = compiled(function)

    def run(student: Tensor, student_weight: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        for x, y in zip(student.chunk(CHUNKS), teacher.chunk(CHUNKS), strict=True):
            total = total + checkpoint(chunk, x, student_weight, y, weight, use_reentrant=False)
        return total

    return run


def liger_jsd(beta: float) -> Callable[..., Tensor] | None:
    """Liger's sum over rows; its beta 0 is the forward KL and 1 the reverse one."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    def run(student: Tensor, student_weight: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        mean = liger_fused_linear_jsd(
            student, student_weight, teacher, weight, jsd_beta=beta, accum_dtype=torch.float32
        )
        return mean * len(student)

    return run


def torch_cross_entropy() -> Callable[..., Tensor] | None:
    """torch's own sum over rows without all logits."""
    if not hasattr(F, "linear_cross_entropy"):
        return None
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", ignore_index=-100, options=options
    )


def attention_calls(dtype: torch.dtype, device: str, *widths: int) -> bool:
    """Whether this torch's attention that returns lse takes these."""
    if device == "cpu":
        return dtype == torch.float32
    return dtype != torch.float32 and max(widths) <= 256 and not any(w % 8 for w in widths)


class AttentionCalls(torch.autograd.Function):
    """The KL of attention rows by attention calls alone, in linear memory.

    With O(P, V) = P V, what attention returns for values V, and a the scales:
        KL_i = a_t <q^t_i, O(P, k^t)_i> - a_s <q^s_i, O(P, k^s)_i> - lse^t_i + lse^s_i
        dq^s = a_s g (O(Q, k^s) - O(P, k^s)),   dk^s = a_s (Q - P)^t (g q^s)
    and (Q - P)^t x is the gradient that attention gives its values. A relation is q = k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,  # [B, H, L, ds]
        student_key: Tensor,
        teacher_query: Tensor,  # [B, H, L, dt]
        teacher_key: Tensor,
        causal: bool,
    ) -> Tensor:  # [B, H, L]
        widths = teacher_query.shape[-1], student_query.shape[-1]
        teacher_scale, student_scale = (width**-0.5 for width in widths)
        # Attention wants values as wide as keys: the narrower side is padded with zeros.
        wide = max(widths)
        values = [F.pad(student_key.detach(), (0, wide - widths[1])) for _ in range(2)]
        query, key, own_query, own_key = (
            F.pad(x.detach(), (0, wide - x.shape[-1]))
            for x in (teacher_query, teacher_key, student_query, student_key)
        )
        with torch.enable_grad():
            ours = [value.requires_grad_() for value in values]
            of_teacher, _ = _attention(query, key, ours[0], causal, teacher_scale)
            of_student, student_lse = _attention(own_query, own_key, ours[1], causal, student_scale)
        entropy, teacher_lse = _attention(query, key, key, causal, teacher_scale)
        rows = teacher_scale * _inner(query, entropy) - student_scale * _inner(
            own_query, of_teacher.detach()
        )
        ctx.graph = (of_teacher, of_student, ours)
        ctx.save_for_backward(student_query)
        ctx.scale = student_scale
        return rows - teacher_lse + student_lse.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query,) = ctx.saved_tensors
        (of_teacher, of_student, values), width = ctx.graph, query.shape[-1]
        weight = (ctx.scale * grad).unsqueeze(-1)
        own = (of_student - of_teacher).detach()[..., :width] * weight
        upstream = F.pad((query * weight).to(query.dtype), (0, of_teacher.shape[-1] - width))
        away, towards = (
            torch.autograd.grad(out, value, upstream)[0][..., :width]
            for out, value in zip((of_teacher, of_student), values, strict=True)
        )
        return own.to(query.dtype), towards - away, None, None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The result and the natural lse of its rows."""
    name = "_scaled_dot_product_flash_attention" + "_for_cpu" * (query.device.type == "cpu")
    return getattr(torch.ops.aten, name)(query, key, value, 0.0, causal, scale=scale)[:2]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() * y.float()).sum(-1)


def moderate(width: int) -> float:
    """A factor for random vectors of this width: the score of one with itself becomes 6, where a
    softmax is neither flat nor one-hot."""
    return math.sqrt(6 / math.sqrt(width))
