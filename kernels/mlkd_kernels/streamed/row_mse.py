"""Mean squared difference of two rows of inner products."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.streamed.blocks import Block, blocks, full_precision
from mlkd_kernels.streamed.row_kl import Limits, Side

NO_LIMITS = Limits()


def row_mse(
    student_query: Tensor,  # [H, M, ds]
    student_key: Tensor,  # [Hkv, N, ds]
    teacher_query: Tensor,  # [H, M, dt]
    teacher_key: Tensor,  # [Hkv', N, dt]
    scales: tuple[float, float],  # student's, teacher's
    share: Tensor,  # [H, M] weight of each of the row's squares
    causal: bool,
) -> Tensor:  # [H, M]
    """share_i sum_j (s_ij - t_ij)^2 of the scaled inner products s and t.

    Vectors that do not count are 0 and give no difference, so only causality is masked.
    """
    return _RowMSE.apply(
        student_query, student_key, teacher_query, teacher_key, scales, share, causal
    )


class _RowMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        scales: tuple[float, float],
        share: Tensor,
        causal: bool,
    ) -> Tensor:
        # The scores are made again in backward, so that none outlives its block.
        ctx.save_for_backward(student_query, student_key, teacher_query, teacher_key, share)
        ctx.scales, ctx.causal = scales, causal
        student = Side(student_query, student_key, scales[0])
        teacher = Side(teacher_query, teacher_key, scales[1])
        rows = torch.zeros_like(share)
        with full_precision(rows):
            for block, gap in _gaps(student, teacher, causal):
                rows[block.heads, block.rows] = gap.square_().sum(-1)
        return rows.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student_query, student_key, teacher_query, teacher_key, share = ctx.saved_tensors
        student = Side(student_query, student_key, ctx.scales[0])
        teacher = Side(teacher_query, teacher_key, ctx.scales[1])
        as_query = torch.zeros_like(student_query) if ctx.needs_input_grad[0] else None
        as_key = torch.zeros_like(student_key) if ctx.needs_input_grad[1] else None
        weight = (2 * student.scale * grad * share).unsqueeze(-1)
        with full_precision(grad):
            for block, gap in _gaps(student, teacher, ctx.causal):
                gap.mul_(weight[block.heads, block.rows])
                keys = student.key_heads(block.heads)
                flat = gap.view(keys.stop - keys.start, -1, block.columns)
                if as_query is not None:
                    rows = as_query[block.heads, block.rows]
                    rows += torch.bmm(flat, student.key[keys, : block.columns]).view(rows.shape)
                if as_key is not None:
                    as_key[keys, : block.columns].baddbmm_(flat.mT, student.rows(block))
        return as_query, as_key, None, None, None, None, None


def _gaps(student: Side, teacher: Side, causal: bool) -> Iterator[tuple[Block, Tensor]]:
    """Student's minus teacher's scores, block by block; 0 where a row may not look."""
    heads, rows = student.query.shape[:2]
    step = math.lcm(student.share, teacher.share)
    for block in blocks(student.query, heads, step, rows, student.key.shape[1], causal):
        gap = student.scores(block, NO_LIMITS, block.buffers[0])
        gap.sub_(teacher.scores(block, NO_LIMITS, block.buffers[1]))
        if causal:
            gap[..., block.rows].masked_fill_(block.later(gap), 0)
        yield block, gap
