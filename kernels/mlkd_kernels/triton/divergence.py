"""Divergences of two rows of logits and their gradient in one launch: one program per row.

P is the teacher's softmax, Q the student's, m the mixture. A row is read twice for the kinds whose
value is linear in the log-probabilities, three times for the others. All in fp32; the logits come
from a matrix product and are scaled already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkd_kernels.streamed.linear_divergence import Options
from mlkd_kernels.triton._common import LN_2, LOG2_E, MASKED
from mlkd_kernels.triton._launch import on_device
from mlkd_kernels.triton._tiles import row_tile
from mlkd_kernels.triton.row_kl import absorb, nothing_seen


@triton.jit
def soft_capped(x, cap):
    """cap tanh(x), and tanh(x)."""
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    tanh = (1.0 - power) / (1.0 + power)
    tanh = tl.where(x < 0, -tanh, tanh)
    return cap * tanh, tanh


@triton.jit
def load_logits(line, at, inside, cap):
    """In base 2, MASKED outside of the vocabulary, and the tanh of the soft cap."""
    x = tl.load(line + at, mask=inside, other=0.0)
    tanh = x
    if cap is not None:
        x, tanh = soft_capped(x, cap)
    return tl.where(inside, x * LOG2_E, MASKED), tanh


@triton.jit
def mixed(log_p, log_q, beta):
    """log2(P / m), log2(Q / m), P / m - 1 and Q / m - 1 with m = beta P + (1 - beta) Q.

    Relative to the larger of the two, so that all are exactly 0 where P is Q, and none overflows.
    """
    gap = tl.where(log_p == log_q, 0.0, log_p - log_q)
    more = gap > 0
    less = tl.exp2(-tl.abs(gap)) - 1.0
    x = less * tl.where(more, 1.0 - beta, beta)
    of_larger = -tl.log2(1.0 + x)
    of_smaller = of_larger - tl.abs(gap)
    excess_of_larger = -x / (1.0 + x)
    excess_of_smaller = (less - x) / (1.0 + x)
    return (
        tl.where(more, of_larger, of_smaller),
        tl.where(more, of_smaller, of_larger),
        tl.where(more, excess_of_larger, excess_of_smaller),
        tl.where(more, excess_of_smaller, excess_of_larger),
    )


@triton.jit
def terms(log_p, log_q, beta, KIND: tl.constexpr):
    """What an entry adds to the divergence, and u, by which its gradient is Q (u - sum Q u)."""
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    if KIND == "tvd":
        value = 0.5 * tl.abs(p - q)
        u = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    elif KIND == "jsd":
        p_gap, q_gap, _, _ = mixed(log_p, log_q, beta)
        u = q_gap * LN_2 * (1.0 - beta)
        value = tl.where(p > 0, p * (p_gap * LN_2 * beta), 0.0) + tl.where(q > 0, q * u, 0.0)
    elif KIND == "skew_forward_kl":
        p_gap, _, p_excess, _ = mixed(log_p, log_q, beta)
        u = p_excess * (beta - 1.0)
        value = tl.where(p > 0, p * (p_gap * LN_2), 0.0)
    else:
        tl.static_assert(KIND == "skew_reverse_kl")
        q_gap, _, q_excess, _ = mixed(log_q, log_p, beta)
        u = q_gap * LN_2 - q_excess * beta
        value = tl.where(q > 0, q * (q_gap * LN_2), 0.0)
    # Where Q is 0 its u may be infinite.
    return value, tl.where(q > 0, u, 0.0), q


@triton.jit(do_not_specialize=["vocabulary"])
def divergence_rows(
    teacher,
    student,
    labels,
    weight,
    out,
    slope,
    vocabulary,
    line,
    teacher_cap,
    student_cap,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the divergence, slope = weight times its gradient by the products before any cap.

    A row of weight 0 is not read. `slope` None: no gradient is wanted.
    """
    index = tl.program_id(0).to(tl.int64)
    student += index * line
    if teacher is not None:
        teacher += index * line
    if slope is not None:
        slope += index * line
    w = 1.0
    end = vocabulary
    if weight is not None:
        w = tl.load(weight + index)
        end = tl.where(w == 0.0, 0, vocabulary)
    state = nothing_seen()
    for first in range(0, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        s, _ = load_logits(student, at, at < vocabulary, student_cap)
        t = s
        if KIND != "cross_entropy":
            t, _ = load_logits(teacher, at, at < vocabulary, teacher_cap)
        if KIND == "reverse_kl":
            state = absorb(s, t, state)
        else:
            state = absorb(t, s, state)
    # A row of weight 0 has seen nothing.
    first_max, first_sum, second_max, second_sum, cross = state
    first_log = tl.log2(tl.where(w == 0.0, 1.0, first_sum))
    second_log = tl.log2(tl.where(w == 0.0, 1.0, second_sum))
    t_lse = first_max + first_log
    s_lse = second_max + second_log
    value = (cross / tl.where(w == 0.0, 1.0, first_sum) - first_log + second_log) * LN_2
    if KIND == "reverse_kl":
        t_lse, s_lse = s_lse, t_lse
    mean = value
    label = -1
    if KIND == "cross_entropy":
        label = tl.load(labels + index)
        x, _ = load_logits(student, label, (label >= 0) & (w != 0.0), student_cap)
        value = tl.where(w == 0.0, 0.0, (s_lse - x) * LN_2)
    elif KIND != "forward_kl" and KIND != "reverse_kl":
        value = tl.full([], 0.0, tl.float32)
        mean = tl.full([], 0.0, tl.float32)
        for first in range(0, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            t, _ = load_logits(teacher, at, at < vocabulary, teacher_cap)
            s, _ = load_logits(student, at, at < vocabulary, student_cap)
            found, u, q = terms(t - t_lse, s - s_lse, beta, KIND)
            value += tl.sum(found, 0)
            mean += tl.sum(q * u, 0)
    tl.store(out + index, value)
    if slope is not None:
        for first in range(0, vocabulary, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < vocabulary
            used = at < end
            s, tanh = load_logits(student, at, used, student_cap)
            log_q = s - s_lse
            if KIND == "cross_entropy":
                found = tl.exp2(log_q) - tl.where(at == label, 1.0, 0.0)
            else:
                t, _ = load_logits(teacher, at, used, teacher_cap)
                log_p = t - t_lse
                if KIND == "forward_kl":
                    found = tl.exp2(log_q) - tl.exp2(log_p)
                elif KIND == "reverse_kl":
                    q = tl.exp2(log_q)
                    found = tl.where(q > 0, q * ((log_q - log_p) * LN_2 - mean), 0.0)
                else:
                    _, u, q = terms(log_p, log_q, beta, KIND)
                    found = q * (u - mean)
            if student_cap is not None:
                found *= 1.0 - tanh * tanh
            found = tl.where(used, w * found, 0.0)
            tl.store(slope + at, found.to(slope.dtype.element_ty), mask=inside)


def fused(
    teacher: Tensor | None, student: Tensor, spare: Tensor, options: Options, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """streamed.linear_divergence.Divergences"""
    rows = torch.empty(len(student), dtype=torch.float32, device=student.device)
    slope = spare if with_slope else None
    tile = row_tile(student.shape[1])
    with on_device(student):
        divergence_rows[(len(student),)](
            teacher, student, options.labels, options.row_weight, rows, slope,
            *student.shape[1:], student.stride(0),
            options.teacher_cap, options.student_cap, options.beta, options.kind,
            tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return rows, slope
