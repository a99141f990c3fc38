"""relation_kl as two kernels: no L x L matrix, no atomics, the same bits in every run."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.triton._common import (
    BOTH,
    COLUMN,
    INF,
    ROW,
    WIDEST_SPREAD,
    collect,
    divergence_rows,
    load_kept,
    load_rows,
    load_tile,
    store_tile,
)
from mlkd_kernels.triton._launch import LOG2_E, gradient_like, on_device, row_gradient, rowwise
from mlkd_kernels.triton._tiles import check_supported, choose_tile, head_part, tail_part


@triton.jit(do_not_specialize=["length"])
def relation_forward(
    student,
    teacher,
    keep,
    rows,
    student_lse,
    teacher_lse,
    student_batch,
    student_row,
    teacher_batch,
    teacher_row,
    heads,
    length,
    student_scale,
    teacher_scale,
    CAUSAL: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    blocks = tl.cdiv(length, OWN)
    start = tl.program_id(0) % blocks * OWN
    head = (tl.program_id(0) // blocks).to(tl.int64)
    batch = head // heads
    student += batch * student_batch + head % heads * STUDENT_WIDTH
    teacher += batch * teacher_batch + head % heads * TEACHER_WIDTH
    if keep is not None:
        keep += batch * length
    kl, s_lse, t_lse = divergence_rows(
        (student, student_row, student, student_row, student_scale),
        (teacher, teacher_row, teacher, teacher_row, teacher_scale),
        keep, length, start, CAUSAL, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
    )  # fmt: skip
    own = start + tl.arange(0, OWN)
    first = head * length
    tl.store(rows + first + own, kl, mask=own < length)
    tl.store(student_lse + first + own, s_lse, mask=own < length)
    tl.store(teacher_lse + first + own, t_lse, mask=own < length)


@triton.jit
def lse_range(lse, keep, length, BLOCK: tl.constexpr):
    """Smallest and largest lse of the rows that are kept."""
    low = tl.full([BLOCK], INF, tl.float32)
    high = tl.full([BLOCK], -INF, tl.float32)
    for first in range(0, length, BLOCK):
        kept = load_kept(keep, first, length, BLOCK)
        low = tl.minimum(low, load_rows(lse, kept, first, INF, BLOCK))
        high = tl.maximum(high, load_rows(lse, kept, first, -INF, BLOCK))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit(do_not_specialize=["length"])
def relation_backward(
    student,
    teacher,
    keep,
    student_lse,
    teacher_lse,
    grad,
    unit,
    out,
    student_batch,
    student_row,
    teacher_batch,
    teacher_row,
    out_batch,
    out_row,
    heads,
    length,
    student_scale,
    teacher_scale,
    out_scale,
    CAUSAL: tl.constexpr,
    PAIRED: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """out_i = out_scale * sum_j (D_ij + D_ji) student_j, D_ij = grad_i (Q_ij - P_ij).

    With `causal` D_ij is 0 for j > i: a loop over the keys before i and one over the rows after it.
    """
    blocks = tl.cdiv(length, OWN)
    start = tl.program_id(0) % blocks * OWN
    head = (tl.program_id(0) // blocks).to(tl.int64)
    batch = head // heads
    student += batch * student_batch + head % heads * STUDENT_WIDTH
    teacher += batch * teacher_batch + head % heads * TEACHER_WIDTH
    out += batch * out_batch + head % heads * STUDENT_WIDTH
    student_lse += head * length
    teacher_lse += head * length
    grad += head * length
    if keep is not None:
        keep += batch * length
    kept = load_kept(keep, start, length, OWN)
    x, x_tail = load_tile(student, student_row, kept, start, STUDENT_WIDTH, OWN)
    y, y_tail = load_tile(teacher, teacher_row, kept, start, TEACHER_WIDTH, OWN)
    own = (x, x_tail, y, y_tail)
    stats = (
        load_rows(student_lse, kept, start, INF, OWN),
        load_rows(teacher_lse, kept, start, INF, OWN),
        load_rows(grad, kept, start, 0.0, OWN),
    )
    s = (student, student_row, student_lse, student_scale)
    t = (teacher, teacher_row, teacher_lse, teacher_scale)
    total = tl.zeros([OWN, head_part(STUDENT_WIDTH)], tl.float32)
    total_tail = 0.0
    if tail_part(STUDENT_WIDTH):
        total_tail = tl.zeros([OWN, tail_part(STUDENT_WIDTH)], tl.float32)
    if CAUSAL:
        last = tl.minimum(start + OWN, length)
        total, total_tail = collect(
            total, total_tail, own, stats, s, t, grad, keep, length, start, 0, last, None,
            ROW, True, False, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
        )  # fmt: skip
        first = start // OTHER * OTHER
        total, total_tail = collect(
            total, total_tail, own, stats, s, t, grad, keep, length, start, first, length, None,
            COLUMN, True, False, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
        )  # fmt: skip
    else:
        narrow = False
        center = None
        if PAIRED:
            s_low, s_high = lse_range(student_lse, keep, length, 1024)
            t_low, t_high = lse_range(teacher_lse, keep, length, 1024)
            center = (0.5 * (s_low + s_high), 0.5 * (t_low + t_high))
            narrow = tl.maximum(s_high - s_low, t_high - t_low) < WIDEST_SPREAD
        if narrow:
            total, total_tail = collect(
                total, total_tail, own, stats, s, t, grad, keep, length, start, 0, length, center,
                BOTH, False, PAIRED, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
            )  # fmt: skip
        else:
            total, total_tail = collect(
                total, total_tail, own, stats, s, t, grad, keep, length, start, 0, length, None,
                BOTH, False, False, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
            )  # fmt: skip
    if unit is not None:
        out_scale *= tl.load(unit)
    inside = start + tl.arange(0, OWN) < length
    store_tile(out, out_row, total, total_tail, out_scale, kept, inside, start, STUDENT_WIDTH, OWN)


def pairs(student_width: int, teacher_width: int, causal: bool) -> bool:
    """Whether the gradient has use for its two-exponential form.

    With `causal` an entry takes part in one row only, and wide heads wait for products, not for
    exponentials.
    """
    return not causal and student_width + teacher_width <= 256


class _RelationKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [B, L, R*ds]
        teacher: Tensor,  # [B, L, R*dt]
        keep: Tensor | None,  # [B, L] bool
        heads: int,
        causal: bool,
        scales: tuple[float, float],
    ) -> Tensor:  # [B, R, L]
        batch, length, _ = student.shape
        rows, *lse = (
            torch.empty(batch, heads, length, dtype=torch.float32, device=student.device)
            for _ in range(3)
        )
        if rows.numel():
            widths = student.shape[-1] // heads, teacher.shape[-1] // heads
            dtypes = student.dtype, teacher.dtype
            tile = choose_tile("forward", *widths, *dtypes, device=student.device)
            with on_device(student):
                relation_forward[(triton.cdiv(length, tile.own) * batch * heads,)](
                    student, teacher, keep, rows, *lse,
                    *student.stride()[:2], *teacher.stride()[:2], heads, length,
                    *(scale * LOG2_E for scale in scales), causal, *widths,
                    tile.own, tile.other, num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        ctx.save_for_backward(student, teacher, keep, *lse)
        ctx.heads, ctx.causal, ctx.scales = heads, causal, scales
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, keep, *lse = ctx.saved_tensors
        batch, length, _ = student.shape
        out = gradient_like(student)
        if not grad.numel():
            return out.zero_(), None, None, None, None, None
        widths = student.shape[-1] // ctx.heads, teacher.shape[-1] // ctx.heads
        dtypes = student.dtype, teacher.dtype
        tile = choose_tile("gram_backward", *widths, *dtypes, device=student.device)
        grad, unit = row_gradient(grad, keep, student.dtype)
        paired = pairs(*widths, ctx.causal)
        with on_device(student):
            relation_backward[(triton.cdiv(length, tile.own) * batch * ctx.heads,)](
                student, teacher, keep, *lse, grad, unit, out,
                *student.stride()[:2], *teacher.stride()[:2], *out.stride()[:2],
                ctx.heads, length, *(scale * LOG2_E for scale in ctx.scales), ctx.scales[0],
                ctx.causal, paired, *widths,
                tile.own, tile.other, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return out, None, None, None, None, None


def relation_kl(
    student: Tensor,  # [B, L, R*ds]
    teacher: Tensor,  # [B, L, R*dt]
    keep: Tensor | None,  # [B, L] bool, True where a token is real
    *,
    heads: int,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, R, L]
    """KL(P_i || Q_i) for every relation head and token i, as in mlkd_kernels.relation.

    P_i = softmax_j(teacher_scale * <t_i, t_j>), Q_i likewise of the student: a temperature is part
    of the scales. Rows are fp32; the gradient goes to the student, in its type. Any strides with a
    dense last dimension are read in place. Raises NotImplementedError for heads wider than 256 and
    for float64.
    """
    check_supported(
        student.shape[-1] // heads, teacher.shape[-1] // heads, student.dtype, teacher.dtype
    )
    return _RelationKL.apply(
        rowwise(student),
        rowwise(teacher.detach()),
        None if keep is None else keep.contiguous(),
        heads,
        causal,
        (student_scale, teacher_scale),
    )
