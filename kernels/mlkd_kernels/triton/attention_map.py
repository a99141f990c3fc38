"""attention_kl as three kernels: one forward, one for the queries, one for the keys."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.triton._common import (
    COLUMN,
    INF,
    ROW,
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
def attention_forward(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    keep,
    rows,
    student_lse,
    teacher_lse,
    student_query_batch,
    student_query_head,
    student_query_row,
    student_key_batch,
    student_key_head,
    student_key_row,
    teacher_query_batch,
    teacher_query_head,
    teacher_query_row,
    teacher_key_batch,
    teacher_key_head,
    teacher_key_row,
    heads,
    student_group,
    teacher_group,
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
    index = (tl.program_id(0) // blocks).to(tl.int64)
    batch = index // heads
    head = index % heads
    student_query += batch * student_query_batch + head * student_query_head
    student_key += batch * student_key_batch + head // student_group * student_key_head
    teacher_query += batch * teacher_query_batch + head * teacher_query_head
    teacher_key += batch * teacher_key_batch + head // teacher_group * teacher_key_head
    if keep is not None:
        keep += batch * length
    kl, s_lse, t_lse = divergence_rows(
        (student_query, student_query_row, student_key, student_key_row, student_scale),
        (teacher_query, teacher_query_row, teacher_key, teacher_key_row, teacher_scale),
        keep, length, start, CAUSAL, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
    )  # fmt: skip
    own = start + tl.arange(0, OWN)
    first = index * length
    tl.store(rows + first + own, kl, mask=own < length)
    tl.store(student_lse + first + own, s_lse, mask=own < length)
    tl.store(teacher_lse + first + own, t_lse, mask=own < length)


@triton.jit(do_not_specialize=["length"])
def attention_query_backward(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    keep,
    student_lse,
    teacher_lse,
    grad,
    unit,
    out,
    student_query_batch,
    student_query_head,
    student_query_row,
    student_key_batch,
    student_key_head,
    student_key_row,
    teacher_query_batch,
    teacher_query_head,
    teacher_query_row,
    teacher_key_batch,
    teacher_key_head,
    teacher_key_row,
    out_batch,
    out_head,
    out_row,
    heads,
    student_group,
    teacher_group,
    length,
    student_scale,
    teacher_scale,
    out_scale,
    CAUSAL: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """out_i = out_scale * sum_j grad_i (Q_ij - P_ij) student_key_j."""
    blocks = tl.cdiv(length, OWN)
    start = tl.program_id(0) % blocks * OWN
    index = (tl.program_id(0) // blocks).to(tl.int64)
    batch = index // heads
    head = index % heads
    student_query += batch * student_query_batch + head * student_query_head
    student_key += batch * student_key_batch + head // student_group * student_key_head
    teacher_query += batch * teacher_query_batch + head * teacher_query_head
    teacher_key += batch * teacher_key_batch + head // teacher_group * teacher_key_head
    out += batch * out_batch + head * out_head
    if keep is not None:
        keep += batch * length
    kept = load_kept(keep, start, length, OWN)
    x, x_tail = load_tile(student_query, student_query_row, kept, start, STUDENT_WIDTH, OWN)
    y, y_tail = load_tile(teacher_query, teacher_query_row, kept, start, TEACHER_WIDTH, OWN)
    own = (x, x_tail, y, y_tail)
    stats = (
        load_rows(student_lse + index * length, kept, start, INF, OWN),
        load_rows(teacher_lse + index * length, kept, start, INF, OWN),
        load_rows(grad + index * length, kept, start, 0.0, OWN),
    )
    s = (student_key, student_key_row, None, student_scale)
    t = (teacher_key, teacher_key_row, None, teacher_scale)
    total = tl.zeros([OWN, head_part(STUDENT_WIDTH)], tl.float32)
    total_tail = 0.0
    if tail_part(STUDENT_WIDTH):
        total_tail = tl.zeros([OWN, tail_part(STUDENT_WIDTH)], tl.float32)
    end = tl.minimum(start + OWN, length) if CAUSAL else length
    total, total_tail = collect(
        total, total_tail, own, stats, s, t, None, keep, length, start, 0, end, None,
        ROW, CAUSAL, False, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
    )  # fmt: skip
    if unit is not None:
        out_scale *= tl.load(unit)
    inside = start + tl.arange(0, OWN) < length
    store_tile(out, out_row, total, total_tail, out_scale, kept, inside, start, STUDENT_WIDTH, OWN)


@triton.jit(do_not_specialize=["length"])
def attention_key_backward(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    keep,
    student_lse,
    teacher_lse,
    grad,
    unit,
    out,
    student_query_batch,
    student_query_head,
    student_query_row,
    student_key_batch,
    student_key_head,
    student_key_row,
    teacher_query_batch,
    teacher_query_head,
    teacher_query_row,
    teacher_key_batch,
    teacher_key_head,
    teacher_key_row,
    out_batch,
    out_head,
    out_row,
    heads,
    student_group,
    teacher_group,
    length,
    student_scale,
    teacher_scale,
    out_scale,
    CAUSAL: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """out_j = out_scale * sum over the query heads of j's group and i of
    grad_i (Q_ij - P_ij) student_query_i: one program adds up the group, in a fixed order."""
    blocks = tl.cdiv(length, OWN)
    start = tl.program_id(0) % blocks * OWN
    index = (tl.program_id(0) // blocks).to(tl.int64)
    key_heads = heads // student_group
    batch = index // key_heads
    key_head = index % key_heads
    student_key += batch * student_key_batch + key_head * student_key_head
    out += batch * out_batch + key_head * out_head
    if keep is not None:
        keep += batch * length
    kept = load_kept(keep, start, length, OWN)
    x, x_tail = load_tile(student_key, student_key_row, kept, start, STUDENT_WIDTH, OWN)
    total = tl.zeros([OWN, head_part(STUDENT_WIDTH)], tl.float32)
    total_tail = 0.0
    if tail_part(STUDENT_WIDTH):
        total_tail = tl.zeros([OWN, tail_part(STUDENT_WIDTH)], tl.float32)
    # Hoisting out of this loop would spill registers.
    for member in tl.range(0, student_group, disable_licm=True):
        head = key_head * student_group + member
        y, y_tail = load_tile(
            teacher_key + batch * teacher_key_batch + head // teacher_group * teacher_key_head,
            teacher_key_row, kept, start, TEACHER_WIDTH, OWN,
        )  # fmt: skip
        own = (x, x_tail, y, y_tail)
        line = (batch * heads + head) * length
        query = student_query + batch * student_query_batch + head * student_query_head
        s = (query, student_query_row, student_lse + line, student_scale)
        query = teacher_query + batch * teacher_query_batch + head * teacher_query_head
        t = (query, teacher_query_row, teacher_lse + line, teacher_scale)
        # Masked in every tile: a second loop inside this one would spill registers.
        first = start // OTHER * OTHER if CAUSAL else 0
        total, total_tail = collect(
            total, total_tail, own, None, s, t, grad + line, keep, length, start, first, length,
            None, COLUMN, CAUSAL, False, STUDENT_WIDTH, TEACHER_WIDTH, OWN, OTHER,
        )  # fmt: skip
    if unit is not None:
        out_scale *= tl.load(unit)
    inside = start + tl.arange(0, OWN) < length
    store_tile(out, out_row, total, total_tail, out_scale, kept, inside, start, STUDENT_WIDTH, OWN)


class _AttentionKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,  # [B, H, L, ds]
        student_key: Tensor,  # [B, Hs, L, ds]
        teacher_query: Tensor,  # [B, H, L, dt]
        teacher_key: Tensor,  # [B, Ht, L, dt]
        keep: Tensor | None,  # [B, L] bool
        causal: bool,
        scales: tuple[float, float],
    ) -> Tensor:  # [B, H, L]
        inputs = student_query, student_key, teacher_query, teacher_key
        batch, heads, length, _ = student_query.shape
        rows, *lse = (
            torch.empty(batch, heads, length, dtype=torch.float32, device=student_query.device)
            for _ in range(3)
        )
        if rows.numel():
            tile = choose_tile(
                "forward", *_widths(*inputs), *(x.dtype for x in inputs), device=rows.device
            )
            with on_device(student_query):
                attention_forward[(triton.cdiv(length, tile.own) * batch * heads,)](
                    *inputs, keep, rows, *lse, *_strides(*inputs), *_heads(*inputs), length,
                    *(scale * LOG2_E for scale in scales), causal, *_widths(*inputs),
                    tile.own, tile.other, num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        ctx.save_for_backward(*inputs, keep, *lse)
        ctx.causal, ctx.scales = causal, scales
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, keep, student_lse, teacher_lse = ctx.saved_tensors
        grads = [gradient_like(x) if need else None for x, need in
                 zip(inputs[:2], ctx.needs_input_grad[:2], strict=True)]  # fmt: skip
        if not grad.numel():
            return *(x if x is None else x.zero_() for x in grads), *[None] * 5
        length = grad.shape[2]
        dtypes = [x.dtype for x in inputs]
        grad, unit = row_gradient(grad, keep, dtypes[0])
        kernels = {
            "query_backward": attention_query_backward,
            "key_backward": attention_key_backward,
        }
        for (name, kernel), out in zip(kernels.items(), grads, strict=True):
            if out is None:
                continue
            tile = choose_tile(name, *_widths(*inputs), *dtypes, device=grad.device)
            with on_device(out):
                kernel[(triton.cdiv(length, tile.own) * out.shape[0] * out.shape[1],)](
                    *inputs, keep, student_lse, teacher_lse, grad, unit, out,
                    *_strides(*inputs, out), *_heads(*inputs), length,
                    *(scale * LOG2_E for scale in ctx.scales), ctx.scales[0],
                    ctx.causal, *_widths(*inputs),
                    tile.own, tile.other, num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        return *grads, *[None] * 5


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _widths(student_query: Tensor, _: Tensor, teacher_query: Tensor, __: Tensor) -> tuple[int, int]:
    return student_query.shape[-1], teacher_query.shape[-1]


def _heads(
    student_query: Tensor, student_key: Tensor, _: Tensor, teacher_key: Tensor
) -> tuple[int, int, int]:
    """Query heads, and how many of them share a key head of the student and of the teacher."""
    heads = student_query.shape[1]
    return heads, heads // student_key.shape[1], heads // teacher_key.shape[1]


def attention_kl(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hs, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Ht, L, dt]
    keep: Tensor | None,  # [B, L] bool, True where a token is real
    *,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, H, L]
    """KL(P_i || Q_i) of every attention row, as in mlkd_kernels.attention_map.

    P_i = softmax_j(teacher_scale * <q_i, k_j>), Q_i likewise of the student; query head h reads key
    head h // (H / Hs), and of the teacher h // (H / Ht). Rows are fp32; gradients go to the
    student's queries and keys, in their type. Any strides with a dense last dimension are read in
    place. Raises NotImplementedError for heads wider than 256 and for float64.
    """
    inputs = student_query, student_key, teacher_query.detach(), teacher_key.detach()
    check_supported(student_query.shape[-1], teacher_query.shape[-1], *(x.dtype for x in inputs))
    return _AttentionKL.apply(
        *(rowwise(x) for x in inputs),
        None if keep is None else keep.contiguous(),
        causal,
        (student_scale, teacher_scale),
    )
