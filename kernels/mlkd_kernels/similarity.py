"""How the sample-to-sample similarities of teacher and student differ, over the global batch."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mlkd_kernels._backend import choose, type_lacks
from mlkd_kernels._dispatch import Operation, not_traced
from mlkd_kernels._gather import gather, gather_mask, global_samples, own_indices, total
from mlkd_kernels.rows import (
    check_positive,
    drop_masked,
    gram,
    keep_or_all,
    row_kl,
    wide_type,
    widen,
)
from mlkd_kernels.streamed import similarity as streamed
from mlkd_kernels.streamed.blocks import is_small


def similarity_mse(
    student: Tensor,  # [N, ds]
    teacher: Tensor,  # [N, dt]
    *,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # scalar
    """Mean over i, j of (s_ij - t_ij)^2, the cosines of vectors i and j of student and teacher.

    Without `normalize` s_ij and t_ij are the plain inner products. With `group` the batch is that
    of all its ranks, equally many samples each: every rank returns the same value, and a rank's
    samples receive the gradient of that value. Raises ValueError where the numbers of samples
    differ. Tung, Mori 2019 (arXiv 1907.09682); our reading: the vectors are normalised, not the
    rows of the similarity matrix.
    """
    _check_samples(student, teacher)
    student, teacher = (_vectors(x, normalize) for x in (student, teacher.detach()))
    samples = global_samples(student, group)
    if streamed.narrow_is_cheaper(samples, student.shape[1], teacher.shape[1]):
        if group is None:
            return NARROW_MSE("streamed", student, teacher)
        return not_traced(streamed.similarity_mse)(student, teacher, group)
    return _mse(student, teacher, group)


def similarity_kl(
    student: Tensor,  # [N, ds]
    teacher: Tensor,  # [N, dt]
    *,
    temperature: float = 1.0,
    normalize: bool = True,
    mask: Tensor | None = None,  # [N] bool, True where a sample counts
    diagonal: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # [N]
    """KL(P_i || Q_i) for every sample i, P_i = softmax_j(cos(t_i, t_j) / temperature).

    Q_i is the student's likewise. Without `normalize` the score is
    <x_i, x_j> / (sqrt(width) * temperature). No T^2 inside. A masked sample is neither row nor
    column; `diagonal=False` leaves out j = i; a row without columns is 0. With `group` the columns
    are the samples of all its ranks, equally many each, and the rows this rank's own;
    backpropagating every rank's rows gives a sample the gradient of the sum over all ranks. Raises
    ValueError where the numbers of samples differ. Zhang, Yang, Ji 2024 (arXiv 2407.02775), L_SS.
    """
    check_positive("temperature", temperature)
    _check_samples(student, teacher)
    keep = keep_or_all(mask, student, 1)
    samples = global_samples(student, group)
    chosen = choose(backend, student, triton_lacks=type_lacks(student.dtype, teacher.dtype))
    if backend != "triton" and is_small(len(student), samples):
        chosen = "eager"
    scales = [(1.0 if normalize else x.shape[1] ** -0.5) / temperature for x in (student, teacher)]
    if mask is not None:
        student, teacher = drop_masked(student, keep), drop_masked(teacher, keep)
    given = [_vectors(x, normalize) for x in (student, teacher.detach())]
    given.append(None if mask is None else keep)
    options = {"diagonal": diagonal, "student_scale": scales[0], "teacher_scale": scales[1]}
    if group is None:
        return KL(chosen, *given, **options)
    return not_traced(KL.backends[chosen])(*given, **options, group=group)


def _kl(
    student: Tensor,  # [n, ds]
    teacher: Tensor,  # [n, dt]
    keep: Tensor | None,  # [n] bool
    *,
    diagonal: bool,
    student_scale: float,
    teacher_scale: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [n]
    keep = keep_or_all(keep, student, 1)
    allowed = keep[:, None] & gather_mask(keep, group)
    if not diagonal:
        own = own_indices(student, group)
        allowed = allowed & (own[:, None] != torch.arange(allowed.shape[1], device=own.device))
    student_scores = gram(student, gather(student, group), student_scale)
    teacher_scores = gram(teacher, gather(teacher, group), teacher_scale)
    return row_kl(teacher_scores, student_scores, allowed)


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    # Imported here since triton need not be installed.
    from mlkd_kernels.triton.row_kl import FUSED

    return streamed.similarity_kl(*tensors, ops=FUSED, **options)


def _like(student: Tensor, teacher: Tensor, keep: Tensor | None, **_: Any) -> Tensor:
    return student.new_empty(len(student), dtype=wide_type(student, teacher))


KL = Operation(
    "similarity_kl",
    {"eager": _kl, "streamed": streamed.similarity_kl, "triton": _triton},
    "Tensor student, Tensor teacher, Tensor? keep, bool diagonal, float student_scale, "
    "float teacher_scale",
    leaves=1,
    like=_like,
)
NARROW_MSE = Operation(
    "similarity_mse",
    {"streamed": streamed.similarity_mse},
    "Tensor student, Tensor teacher",
    leaves=1,
    like=lambda student, teacher: student.new_empty((), dtype=wide_type(student, teacher)),
    scalar=True,
)


def _mse(
    student: Tensor,  # [n, ds]
    teacher: Tensor,  # [n, dt]
    group: dist.ProcessGroup | None,
) -> Tensor:  # scalar
    student, teacher = (gram(x, gather(x, group), 1.0) for x in (student, teacher))
    return total((student - teacher).square().sum() / student.shape[1] ** 2, group)


def _vectors(x: Tensor, normalize: bool) -> Tensor:  # [n, d] -> [n, d]
    return F.normalize(widen(x), dim=-1) if normalize else widen(x)


def _check_samples(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both must be "
            "[samples, width] with the same number of samples."
        )
