"""Contrast of student and teacher vectors over the global batch."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mlkd_kernels._backend import choose, type_lacks
from mlkd_kernels._dispatch import Operation, not_traced
from mlkd_kernels._gather import gather, gather_mask, global_samples, own_indices
from mlkd_kernels.rows import check_positive, drop_masked, gram, keep_or_all
from mlkd_kernels.streamed import contrastive as streamed
from mlkd_kernels.streamed.blocks import is_small


def info_nce(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    *,
    labels: Tensor | None = None,  # [N] class of a sample, -100 where unknown
    temperature: float = 0.1,
    mask: Tensor | None = None,  # [N] bool, True where a sample counts
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # [N]
    """Supervised contrastive loss over N student and N (detached) teacher vectors z.

    For an anchor i of the 2N:
        loss_i = -1/|P(i)| sum_{p in P(i)} log(exp(z_i.z_p / T) / sum_{a in A(i)} exp(z_i.z_a / T))
    A(i) is all vectors but i, P(i) those of A(i) with i's label; without a label only the same
    sample's vector of the other model. Row n is the mean of sample n's two anchors, so the mean of
    the rows is 1/(2N) sum_i loss_i. z is normalised unless `normalize=False`. T is `temperature`;
    no T^2 inside. A masked sample is neither anchor nor in A(i), and its row is 0. With `group`
    A(i) spans all its ranks, equally many samples each, the rows are this rank's own, and
    backpropagating every rank's rows gives a sample the gradient of the sum over all ranks. Raises
    ValueError where the shapes differ. Khosla et al. 2020 (arXiv 2004.11362), used by Zhang, Yang,
    Ji 2024 (arXiv 2407.02775) as L_SC.
    """
    check_positive("temperature", temperature)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both must be "
            "[samples, width], the same. Project the student to the teacher's width first."
        )
    if labels is not None and labels.shape != student.shape[:1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)}; there must be one for each of {len(student)} "
            "samples."
        )
    keep = keep_or_all(mask, student, 1)
    student, teacher = (drop_masked(x, keep) for x in (student, teacher.detach()))
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    chosen = choose(backend, student, triton_lacks=type_lacks(student.dtype, teacher.dtype))
    scores = 2 * len(student), 2 * global_samples(student, group)
    if backend != "triton" and is_small(*scores):
        chosen = "eager"
    given = student, teacher, keep, labels
    if group is None:
        return OPERATION(chosen, *given, scale=1 / temperature)
    run = not_traced(OPERATION.backends[chosen])
    return run(*given, scale=1 / temperature, group=group)


def _eager(
    student: Tensor,  # [n, D]
    teacher: Tensor,  # [n, D]
    keep: Tensor,  # [n] bool
    labels: Tensor | None,  # [n]
    scale: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [n]
    others, positives = _partners(keep, labels, own_indices(student, group), group)
    everyone = torch.cat([gather(student, group), gather(teacher, group)])
    scores = gram(torch.cat([student, teacher]), everyone, scale)
    spread = scores.masked_fill(~others, torch.finfo(scores.dtype).min).logsumexp(-1)
    pull = torch.where(positives, scores, 0.0).sum(-1) / positives.sum(-1).clamp_min(1)
    anchors = torch.where(others.any(-1), spread - pull, 0.0)
    return anchors.view(2, -1).mean(0)


def _streamed(
    student: Tensor,  # [n, D]
    teacher: Tensor,  # [n, D]
    keep: Tensor,  # [n] bool
    labels: Tensor | None,  # [n]
    scale: float,
    group: dist.ProcessGroup | None = None,
    ops: streamed.ContrastOps = streamed.PLAIN,
) -> Tensor:  # [n]
    partners = streamed.Partners(
        keep,
        gather_mask(keep, group),
        own_indices(student, group),
        labels,
        None if labels is None else gather(labels, group),
    )
    everyone = gather(student, group), gather(teacher, group)
    return streamed.info_nce(student, teacher, *everyone, partners, scale, ops)


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    # Imported here since triton need not be installed.
    from mlkd_kernels.triton.contrastive import FUSED

    return _streamed(*tensors, **options, ops=FUSED)


OPERATION = Operation(
    "info_nce",
    {"eager": _eager, "streamed": _streamed, "triton": _triton},
    "Tensor student, Tensor teacher, Tensor keep, Tensor? labels, float scale",
    leaves=1,
    like=lambda student, *_, **__: student.new_empty(len(student)),
)


def _partners(
    keep: Tensor, labels: Tensor | None, own: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:  # [n] -> [2n, 2N] twice
    """A(i) and P(i) of this rank's anchors: first its students, then its teachers."""
    everyone = gather_mask(keep, group)
    samples = torch.arange(len(everyone), device=keep.device)
    same = own[:, None] == samples
    real = keep[:, None] & everyone
    alike = same
    if labels is not None:
        alike = same | ((labels[:, None] == gather(labels, group)) & (labels != -100)[:, None])
    itself = torch.block_diag(same, same).bool()
    others = real.repeat(2, 2) & ~itself
    return others, others & alike.repeat(2, 2)
