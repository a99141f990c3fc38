"""What the kernels share: a tile of rows, its scores, the divergence of a row block, its gradient.

Scores and everything computed from them are fp32 and in base 2: the factor log2(e) is part of the
scale, which multiplies the product only after it is summed.
"""

import triton
import triton.language as tl

from mlkd_kernels.triton._tiles import head_part, tail_part

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Finite, unlike -inf: the difference of two masked scores is no NaN, and a row whose first keys are
# all masked (left padding) is wiped clean by the first real one.
MASKED = tl.constexpr(-1.0e30)
INF = tl.constexpr(float("inf"))
# In bits. Factors of the two-exponential gradient reach 2^(spread / 2) and what the other factor
# loses by underflow, below 2^-126, is multiplied by as much: nothing above 2^-62 is lost.
WIDEST_SPREAD = tl.constexpr(128.0)
# Which of the two places of a Gram matrix the own rows take.
ROW = tl.constexpr(1)
COLUMN = tl.constexpr(2)
BOTH = tl.constexpr(3)


@triton.jit
def load_kept(keep, start, length, BLOCK: tl.constexpr):
    positions = start + tl.arange(0, BLOCK)
    kept = positions < length
    if keep is not None:
        kept = kept & (tl.load(keep + positions, mask=kept, other=0) != 0)
    return kept


@triton.jit
def load_rows(values, kept, start, other, BLOCK: tl.constexpr):
    """One number per row; `other` where the row is not kept."""
    return tl.load(values + start + tl.arange(0, BLOCK), mask=kept, other=other)


@triton.jit
def part_mask(kept, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, SIZE)
    return kept[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def tile_pointers(
    base, stride, start, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    # Only the block's start can lie beyond 2^31 elements.
    block = base + tl.cast(start, tl.int64) * stride
    columns = FIRST + tl.arange(0, SIZE)
    return block + tl.arange(0, BLOCK)[:, None] * stride + columns[None, :]


@triton.jit
def load_tile(base, stride, kept, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block of rows in two parts; the second is the first again where one is enough.

    Rows that are not kept are never read: 0 * NaN would carry padding into real rows.
    """
    HEAD: tl.constexpr = head_part(WIDTH)
    TAIL: tl.constexpr = tail_part(WIDTH)
    pointers = tile_pointers(base, stride, start, 0, HEAD, BLOCK)
    head = tl.load(pointers, mask=part_mask(kept, 0, WIDTH, HEAD), other=0.0)
    tail = head
    if TAIL:
        pointers = tile_pointers(base, stride, start, HEAD, TAIL, BLOCK)
        tail = tl.load(pointers, mask=part_mask(kept, HEAD, WIDTH, TAIL), other=0.0)
    return head, tail


@triton.jit
def store_tile(
    base,
    stride,
    head,
    tail,
    scale,
    kept,
    inside,
    start,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale times the rows inside the sequence, 0 in those that are not kept."""
    HEAD: tl.constexpr = head_part(WIDTH)
    TAIL: tl.constexpr = tail_part(WIDTH)
    dtype: tl.constexpr = base.dtype.element_ty
    head = tl.where(kept[:, None], head * scale, 0.0).to(dtype)
    pointers = tile_pointers(base, stride, start, 0, HEAD, BLOCK)
    tl.store(pointers, head, mask=part_mask(inside, 0, WIDTH, HEAD))
    if TAIL:
        tail = tl.where(kept[:, None], tail * scale, 0.0).to(dtype)
        pointers = tile_pointers(base, stride, start, HEAD, TAIL, BLOCK)
        tl.store(pointers, tail, mask=part_mask(inside, HEAD, WIDTH, TAIL))


@triton.jit
def scores(left, left_tail, right, right_tail, scale, WIDTH: tl.constexpr):
    # "ieee" speaks of fp32 inputs only: tf32 would spoil the difference of two scores.
    product = tl.dot(left, tl.trans(right), input_precision="ieee")
    if tail_part(WIDTH):
        product = tl.dot(left_tail, tl.trans(right_tail), product, input_precision="ieee")
    return product * scale


@triton.jit
def absorb_keys(
    student,
    teacher,
    own,
    state,
    keep,
    length,
    start,
    begin,
    end,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """The running maxima, sums and cross term of the own rows after the keys begin..end."""
    student_key, student_stride, student_scale = student
    teacher_key, teacher_stride, teacher_scale = teacher
    own_student, own_student_tail, own_teacher, own_teacher_tail = own
    student_max, student_sum, teacher_max, teacher_sum, cross = state
    rows = start + tl.arange(0, OWN)
    for first in range(begin, end, OTHER):
        kept = load_kept(keep, first, length, OTHER)
        x, x_tail = load_tile(student_key, student_stride, kept, first, STUDENT_WIDTH, OTHER)
        y, y_tail = load_tile(teacher_key, teacher_stride, kept, first, TEACHER_WIDTH, OTHER)
        s = scores(own_student, own_student_tail, x, x_tail, student_scale, STUDENT_WIDTH)
        t = scores(own_teacher, own_teacher_tail, y, y_tail, teacher_scale, TEACHER_WIDTH)
        if MASK:
            allowed = kept[None, :]
            if CAUSAL:
                allowed = allowed & ((first + tl.arange(0, OTHER))[None, :] <= rows[:, None])
            s = tl.where(allowed, s, MASKED)
            t = tl.where(allowed, t, MASKED)
        new_student = tl.maximum(student_max, tl.max(s, 1))
        new_teacher = tl.maximum(teacher_max, tl.max(t, 1))
        s -= new_student[:, None]
        t -= new_teacher[:, None]
        student_power = tl.exp2(s)
        teacher_power = tl.exp2(t)
        # The cross term is kept relative to both maxima, so that it stays as small as the KL.
        moved = (teacher_max - new_teacher) - (student_max - new_student)
        shrink = tl.exp2(teacher_max - new_teacher)
        cross = shrink * (cross + teacher_sum * moved) + tl.sum(teacher_power * (t - s), 1)
        teacher_sum = shrink * teacher_sum + tl.sum(teacher_power, 1)
        shrink = tl.exp2(student_max - new_student)
        student_sum = shrink * student_sum + tl.sum(student_power, 1)
        student_max = new_student
        teacher_max = new_teacher
    return student_max, student_sum, teacher_max, teacher_sum, cross


@triton.jit
def divergence_rows(
    student,
    teacher,
    keep,
    length,
    start,
    CAUSAL: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """KL(P_i || Q_i) in nats and the base-2 lse of student and teacher, of OWN rows, in one pass.

    `student` and `teacher` are (queries, stride, keys, stride, scale) of one head.
        KL_i = sum_j P_ij (t_ij - s_ij) - lse(t_i) + lse(s_i)
    A row that is not kept gets KL 0 and lse +inf, so that each later exp2(score - lse) is 0.
    """
    student_query, student_query_stride, student_key, student_key_stride, student_scale = student
    teacher_query, teacher_query_stride, teacher_key, teacher_key_stride, teacher_scale = teacher
    kept = load_kept(keep, start, length, OWN)
    x, x_tail = load_tile(student_query, student_query_stride, kept, start, STUDENT_WIDTH, OWN)
    y, y_tail = load_tile(teacher_query, teacher_query_stride, kept, start, TEACHER_WIDTH, OWN)
    own = (x, x_tail, y, y_tail)
    student = (student_key, student_key_stride, student_scale)
    teacher = (teacher_key, teacher_key_stride, teacher_scale)
    low = tl.full([OWN], MASKED, tl.float32)
    zero = tl.zeros([OWN], tl.float32)
    state = (low, zero, low, zero, zero)
    end = length
    whole = 0
    if CAUSAL:
        end = tl.minimum(length, start + OWN)
    if keep is None:
        # Most tiles need no mask where there is no padding.
        whole = (start if CAUSAL else length) // OTHER * OTHER
        state = absorb_keys(
            student, teacher, own, state, keep, length, start, 0, whole,
            False, CAUSAL, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
        )  # fmt: skip
    state = absorb_keys(
        student, teacher, own, state, keep, length, start, whole, end,
        True, CAUSAL, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
    )  # fmt: skip
    student_max, student_sum, teacher_max, teacher_sum, cross = state
    student_log = tl.log2(student_sum)
    teacher_log = tl.log2(teacher_sum)
    kl = (cross / teacher_sum - teacher_log + student_log) * LN_2
    student_lse = tl.where(kept, student_max + student_log, INF)
    teacher_lse = tl.where(kept, teacher_max + teacher_log, INF)
    return tl.where(kept, kl, 0.0), student_lse, teacher_lse


@triton.jit
def row_gap(s, t, stats, kept, here, there, CAUSAL: tl.constexpr):
    """Gradient of the own rows' KL by their scores, grad * (Q - P); exactly 0 where s is t."""
    student_lse, teacher_lse, grad = stats
    q = tl.exp2(s - student_lse[:, None])
    p = tl.exp2(t - teacher_lse[:, None])
    seen = kept[None, :]
    if CAUSAL:
        seen = seen & (there <= here)
    return tl.where(seen, grad[:, None] * (q - p), 0.0)


@triton.jit
def column_gap(s, t, stats, here, there, CAUSAL: tl.constexpr):
    """Gradient of the other rows' KL by their scores against the own rows, which are keys here."""
    student_lse, teacher_lse, grad = stats
    q = tl.exp2(s - student_lse[None, :])
    p = tl.exp2(t - teacher_lse[None, :])
    result = grad[None, :] * (q - p)
    if CAUSAL:
        result = tl.where(there >= here, result, 0.0)
    return result


@triton.jit
def paired_gap(s, t, own_stats, other_stats, center):
    """gap by rows + gap by columns of a Gram matrix with two exponentials instead of four.

    h = exp2(s_ij - (lse_i + lse_j) / 2) is at most 1, since s_ij is one of the terms of lse_i and,
    as s_ji, of lse_j. Then exp2(s_ij - lse_i) = h * up_j * down_i, and transposed likewise, with
    up = exp2((lse - center) / 2) and down = 1 / up: exponentials of rows, not of entries.
    """
    own_student, own_teacher, own_grad = own_stats
    other_student, other_teacher, other_grad = other_stats
    student_center, teacher_center = center
    hs = tl.exp2(s - 0.5 * own_student[:, None] - 0.5 * other_student[None, :])
    ht = tl.exp2(t - 0.5 * own_teacher[:, None] - 0.5 * other_teacher[None, :])
    weight_s = pair_weight(own_student, own_grad, other_student, other_grad, student_center)
    weight_t = pair_weight(own_teacher, own_grad, other_teacher, other_grad, teacher_center)
    # hs * weight_s - ht * weight_t, written so that it is exactly 0 where s is t even if the
    # compiler fuses a product and a sum. Crossed with the smaller weight: the larger one, of rows
    # whose lse the models spread differently, would bring terms that cancel.
    more = tl.abs(weight_s) > tl.abs(weight_t)
    smaller = tl.where(more, weight_t, weight_s)
    return (hs - ht) * smaller + tl.where(more, hs, ht) * (weight_s - weight_t)


@triton.jit
def pair_weight(own_lse, own_grad, other_lse, other_grad, center):
    # Rows that are not kept have lse +inf and gradient 0, which must not become NaN.
    own = 0.5 * tl.minimum(own_lse - center, WIDEST_SPREAD)
    other = 0.5 * tl.minimum(other_lse - center, WIDEST_SPREAD)
    by_row = (own_grad * tl.exp2(-own))[:, None] * tl.exp2(other)[None, :]
    return by_row + tl.exp2(own)[:, None] * (other_grad * tl.exp2(-other))[None, :]


@triton.jit
def collect(
    total,
    total_tail,
    own,
    own_stats,
    student,
    teacher,
    grad,
    keep,
    length,
    start,
    begin,
    end,
    center,
    ROLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAIRED: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """total + sum over the other rows begin..end of the scores' gradient times the student's row.

    As ROW the own rows are queries and the others keys, as COLUMN the reverse; in a Gram matrix
    they are both. `student` and `teacher` are (rows, stride, lse, scale) of the others.
    """
    own_student, own_student_tail, own_teacher, own_teacher_tail = own
    student_rows, student_stride, student_lse, student_scale = student
    teacher_rows, teacher_stride, teacher_lse, teacher_scale = teacher
    here = start + tl.arange(0, OWN)[:, None]
    # Rows without statistics of their own are keys, whose loop stands in one over query heads: with
    # wide heads no register is left for what is the same in every turn.
    LEAN: tl.constexpr = own_stats is None and STUDENT_WIDTH + TEACHER_WIDTH > 256
    for first in tl.range(begin, end, OTHER, disable_licm=LEAN):
        kept = load_kept(keep, first, length, OTHER)
        x, x_tail = load_tile(student_rows, student_stride, kept, first, STUDENT_WIDTH, OTHER)
        y, y_tail = load_tile(teacher_rows, teacher_stride, kept, first, TEACHER_WIDTH, OTHER)
        s = scores(own_student, own_student_tail, x, x_tail, student_scale, STUDENT_WIDTH)
        t = scores(own_teacher, own_teacher_tail, y, y_tail, teacher_scale, TEACHER_WIDTH)
        there = first + tl.arange(0, OTHER)[None, :]
        if ROLE != ROW:
            s_lse = load_rows(student_lse, kept, first, INF, OTHER)
            t_lse = load_rows(teacher_lse, kept, first, INF, OTHER)
            g = load_rows(grad, kept, first, 0.0, OTHER)
        if PAIRED:
            e = paired_gap(s, t, own_stats, (s_lse, t_lse, g), center)
        elif ROLE == ROW:
            e = row_gap(s, t, own_stats, kept, here, there, CAUSAL)
        elif ROLE == COLUMN:
            e = column_gap(s, t, (s_lse, t_lse, g), here, there, CAUSAL)
        else:
            e = row_gap(s, t, own_stats, kept, here, there, CAUSAL)
            e += column_gap(s, t, (s_lse, t_lse, g), here, there, CAUSAL)
        # Rounding after the subtraction: the difference has lost no digits before.
        e = e.to(x.dtype)
        total = tl.dot(e, x, total, input_precision="ieee")
        if tail_part(STUDENT_WIDTH):
            total_tail = tl.dot(e, x_tail, total_tail, input_precision="ieee")
    return total, total_tail
