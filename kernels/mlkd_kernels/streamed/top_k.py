"""The divergence over a teacher's likeliest entries and one bucket of all others, in chunks of
tokens.

With scores s = [z of the k entries, r], r = log sum exp(z) of the others, both distributions are
softmaxes of k + 1 scores, and the kinds and their slopes are those of whole rows. dr / dz_v is the
share exp(z_v - r) of entry v in the bucket: its slope is this share of the bucket's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mlkd_kernels.rows import wide_type, widen, zero_masked
from mlkd_kernels.streamed.blocks import on_cpu
from mlkd_kernels.streamed.divergence import KINDS
from mlkd_kernels.streamed.linear_divergence import Head, by_products, capped, in_chunks


class Buckets(NamedTuple):
    """What a chunk of rows is compared with; see linear_divergence.Options."""

    kind: str
    beta: float
    row_weight: Tensor | None  # [N], 0 where a row does not count
    scores: Tensor  # [N, k]
    ids: Tensor  # [N, k]
    rest: Tensor | None  # [N]
    student_cap: float | None

    def of(self, rows: slice) -> "Buckets":
        names = ("row_weight", "scores", "ids", "rest")
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{n: None if x is None else x[rows] for n, x in given.items()})


def by_buckets(
    teacher: None, student: Tensor, spare: Tensor, options: Buckets, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """linear_divergence.Divergences"""
    # It has the type of the student's factors, which may be 16 bits.
    spare = spare if spare.dtype == student.dtype else torch.empty_like(student)
    student, tanh = capped(student, options.student_cap)
    scores, ours = options.scores.to(student.dtype), student.gather(1, options.ids)
    if options.rest is not None:
        student.scatter_(1, options.ids, float("-inf"))
        top = student.amax(-1, keepdim=True)
        power = torch.sub(student, top, out=spare).exp_()
        total = power.sum(-1, keepdim=True)
        scores = torch.cat([scores, options.rest.to(scores.dtype).unsqueeze(1)], 1)
        ours = torch.cat([ours, top + total.log()], 1)
    rows, slope = KINDS[options.kind](scores.log_softmax(-1), ours.log_softmax(-1), options.beta)
    if not with_slope:
        return rows, None
    found, small = spare, slope()
    if options.rest is not None:
        found = power.mul_(small[:, -1:] / total)
    found.scatter_(1, options.ids, small[:, : options.ids.shape[1]])
    return rows, by_products(found, tanh, options.row_weight)


def top_k_divergence(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_scores: Tensor,  # [N, k]
    teacher_ids: Tensor,  # [N, k]
    teacher_rest: Tensor | None,  # [N]
    keep: Tensor | None,  # [N] bool, None where all rows count
    row_weight: Tensor | None,  # [N]
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_scale: float,
    student_cap: float | None,
) -> Tensor:  # scalar
    scores, ids, rest = teacher_scores, teacher_ids, teacher_rest
    if keep is not None and on_cpu(keep):
        real = keep.nonzero().squeeze(1)
        student_hidden, scores, ids, rest, row_weight = (
            None if x is None else x.index_select(0, real)
            for x in (student_hidden, scores, ids, rest, row_weight)
        )
    elif keep is not None:
        student_hidden, scores = zero_masked(student_hidden, keep), zero_masked(scores, keep)
        ids = torch.where(keep.unsqueeze(1), ids, torch.arange(ids.shape[1], device=ids.device))
        rest = None if rest is None else torch.where(keep, rest, 0)
    head = Head(student_scale, student_cap, temperature)
    wide = wide_type(student_hidden, student_weight)
    weight = None if row_weight is None else row_weight.to(wide)
    buckets = Buckets(kind, beta, weight, widen(scores), ids, rest, head.cap)
    return in_chunks(student_hidden, student_weight, None, None, (head, None), buckets, by_buckets)
