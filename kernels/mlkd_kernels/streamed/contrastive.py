"""Contrast over the global batch without the matrix of all pairs."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels.rows import full_precision
from mlkd_kernels.streamed.blocks import Block, blocks, shaped


class Partners(NamedTuple):
    """What decides which of the N global samples an anchor sees and which are its positives."""

    keep: Tensor  # [n] bool, this rank's samples
    keep_all: Tensor  # [N] bool
    own: Tensor  # [n], where this rank's samples stand among the N
    labels: Tensor | None  # [n]
    labels_all: Tensor | None  # [N]

    def alike(self, rows: slice) -> Tensor:  # -> [r, N] bool
        """True for the sample itself and, where it has a label, for those of the same label."""
        same = self.itself(rows)
        if self.labels is None:
            return same
        labels = self.labels[rows, None]
        return same | ((labels == self.labels_all) & (labels != -100))

    def itself(self, rows: slice) -> Tensor:  # -> [r, N] bool
        return self.own[rows, None] == torch.arange(len(self.keep_all), device=self.own.device)


class ContrastOps(NamedTuple):
    """What is done with the scores [2, r, N] of a block's anchors, which it may write over: the
    anchors are students (side 0) or teachers (1), the columns all students and all teachers."""

    # scores, partners, side, rows -> losses [r]
    losses: Callable[[Tensor, Partners, int, slice], Tensor]
    # the same and the gradient of the losses [r] -> that of the scores
    slope: Callable[[Tensor, Tensor, Partners, int, slice], Tensor]


def losses(scores: Tensor, partners: Partners, side: int, rows: slice) -> Tensor:
    others, positives = _see(partners, side, rows)
    scores.masked_fill_(~others, torch.finfo(scores.dtype).min)
    pull = torch.where(positives, scores, 0.0).sum((0, 2)) / _count(positives)
    spread = scores.logsumexp((0, 2))
    return torch.where(others.any(-1).any(0), spread - pull, 0.0)


def slope(scores: Tensor, grad: Tensor, partners: Partners, side: int, rows: slice) -> Tensor:
    others, positives = _see(partners, side, rows)
    scores.masked_fill_(~others, torch.finfo(scores.dtype).min)
    p = scores.sub_(scores.amax((0, 2), keepdim=True)).exp_()
    p.div_(p.sum((0, 2), keepdim=True))
    p.sub_(positives.to(p.dtype).div_(_count(positives).unsqueeze(-1)))
    # An anchor that sees nothing has all of its entries here equal, and no loss.
    return p.mul_((grad * others.any(-1).any(0)).unsqueeze(-1))


PLAIN = ContrastOps(losses, slope)


def info_nce(
    student: Tensor,  # [n, D], 0 where masked, normalised where that is wanted
    teacher: Tensor,  # [n, D]
    students: Tensor,  # [N, D], all ranks'
    teachers: Tensor,  # [N, D]
    partners: Partners,
    scale: float,
    ops: ContrastOps = PLAIN,
) -> Tensor:  # [n]
    anchors = _InfoNCE.apply(student, teacher, students, teachers, partners, scale, ops)
    return anchors.mean(0)


class Vectors(NamedTuple):
    student: Tensor  # [n, D]
    teacher: Tensor  # [n, D]
    students: Tensor  # [N, D]
    teachers: Tensor  # [N, D]

    def blocks(self) -> Iterator[Block]:
        return blocks(self.student, 2, 2, len(self.student), len(self.students))


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        students: Tensor,
        teachers: Tensor,
        partners: Partners,
        scale: float,
        ops: ContrastOps,
    ) -> Tensor:  # [2, n]
        vectors = Vectors(student, teacher, students, teachers)
        ctx.save_for_backward(*vectors)
        ctx.partners, ctx.scale, ctx.ops = partners, scale, ops
        rows = student.new_empty(2, len(student))
        for side in range(2):
            for block in vectors.blocks():
                scores = _scores(vectors, side, block, scale)
                rows[side, block.rows] = ops.losses(scores, partners, side, block.rows)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vectors = Vectors(*ctx.saved_tensors)
        as_anchor, as_column = torch.zeros_like(vectors.student), torch.zeros_like(vectors.students)
        for side in range(2):
            for block in vectors.blocks():
                scores = _scores(vectors, side, block, ctx.scale)
                upstream = grad[side, block.rows] * ctx.scale
                slope = ctx.ops.slope(scores, upstream, ctx.partners, side, block.rows)
                with full_precision(grad):
                    if side == 0:
                        own = as_anchor[block.rows]
                        own.addmm_(slope[0], vectors.students).addmm_(slope[1], vectors.teachers)
                    as_column.addmm_(slope[0].mT, vectors[side][block.rows])
        return as_anchor, None, as_column, *[None] * 4


def _scores(vectors: Vectors, side: int, block: Block, scale: float) -> Tensor:  # -> [2, r, N]
    """Of a block's students (side 0) or teachers (side 1) with all students and all teachers."""
    scores = shaped(block.buffers[0], *block.shape)
    with full_precision(scores):
        for columns, out in zip(vectors[2:], scores, strict=True):
            anchors = vectors[side][block.rows]
            torch.addmm(out, anchors, columns.mT, beta=0, alpha=scale, out=out)
    return scores


def _see(partners: Partners, side: int, rows: slice) -> tuple[Tensor, Tensor]:  # -> [2, r, N] twice
    """Which vectors an anchor sees, and which of them are its positives."""
    others = (partners.keep[rows, None] & partners.keep_all).repeat(2, 1, 1)
    others[side] &= ~partners.itself(rows)
    return others, others & partners.alike(rows)


def _count(positives: Tensor) -> Tensor:  # [2, r, N] -> [r]
    return positives.sum((0, 2)).clamp_min(1)
