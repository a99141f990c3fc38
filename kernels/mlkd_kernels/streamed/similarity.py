"""Differences of sample-to-sample similarities without the matrix of all samples."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlkd_kernels._gather import gather, gather_mask, global_samples
from mlkd_kernels.rows import full_precision
from mlkd_kernels.streamed.row_kl import row_kl
from mlkd_kernels.streamed.row_ops import PLAIN, Limits, RowOps


def similarity_kl(
    student: Tensor,  # [n, ds], 0 where masked, normalised where that is wanted
    teacher: Tensor,  # [n, dt]
    keep: Tensor | None,  # [n] bool
    *,
    diagonal: bool,
    student_scale: float,
    teacher_scale: float,
    group: dist.ProcessGroup | None = None,
    ops: RowOps = PLAIN,
) -> Tensor:  # [n]
    bias, excluded = None, None
    if keep is not None:
        real = gather_mask(keep, group)
        bias = torch.zeros(real.shape, dtype=student.dtype, device=real.device)
        bias = bias.masked_fill_(~real, torch.finfo(bias.dtype).min).unsqueeze(0)
    if not diagonal:
        excluded = 0 if group is None else dist.get_rank(group) * len(student)
    rows = row_kl(
        student.unsqueeze(0),
        None if group is None else gather(student, group).unsqueeze(0),
        teacher.unsqueeze(0),
        None if group is None else gather(teacher, group).unsqueeze(0),
        (student_scale, teacher_scale),
        Limits(bias, excluded=excluded),
        ops,
    )
    return rows.squeeze(0)


def similarity_mse(
    student: Tensor,  # [n, ds], normalised where that is wanted
    teacher: Tensor,  # [n, dt]
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # scalar
    """With Z the vectors: |Z Z'^t|^2 = <Z^t Z, Z'^t Z'> turns N x N sums into D x D ones."""
    return _SimilarityMSE.apply(student, teacher, group)


def narrow_is_cheaper(samples: int, student_width: int, teacher_width: int) -> bool:
    """Whether the products of the widths cost less than those of all samples, forward and back."""
    narrow = teacher_width**2 + 2 * teacher_width * student_width + 2 * student_width**2
    return narrow < samples * (teacher_width + 2 * student_width)


class _SimilarityMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        with full_precision(student):
            # All three by the same product: of the same vectors they are the same to the bit.
            products = [a.mT @ b for a, b in ((student, student), (teacher, student))]
            products.append(teacher.mT @ teacher)
        if group is not None:
            for product in products:
                dist.all_reduce(product, group=group)
        own, cross, given = products
        ctx.save_for_backward(student, teacher, own, cross)
        ctx.pairs = global_samples(student, group) ** 2
        own, cross, given = (product.square().sum() for product in products)
        return (own + given - 2 * cross) / ctx.pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, own, cross = ctx.saved_tensors
        with full_precision(student):
            gap = student @ own - teacher @ cross
        return gap * (4 * grad / ctx.pairs), None, None
