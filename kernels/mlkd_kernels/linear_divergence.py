"""Divergences between the distributions that two output heads make of hidden states."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlkd_kernels._backend import choose, type_lacks
from mlkd_kernels._dispatch import Operation
from mlkd_kernels.rows import check_positive, drop_masked, gram, keep_or_all, row_kl, wide_type
from mlkd_kernels.streamed import linear_divergence as streamed
from mlkd_kernels.streamed.linear_divergence import Head

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "cross_entropy",
)
MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")


def linear_divergence(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [N, E]
    teacher_weight: Tensor | None,  # [V, E]
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    row_weight: Tensor | None = None,  # [N]
    labels: Tensor | None = None,  # [N], -100 where ignored
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    truncate: bool = False,
    backend: str = "auto",
) -> Tensor:  # scalar
    """Sum over rows of row_weight times the divergence of P (teacher) and Q (student).

    P = softmax(z / T), z = teacher_logit_scale * teacher_hidden teacher_weight^t, Q the student's
    likewise, T the temperature; no T^2 inside. With a soft cap c z becomes c tanh(z / c), before
    the temperature. By `kind`:
        forward_kl       KL(P || Q)
        reverse_kl       KL(Q || P)
        jsd              beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q
        skew_forward_kl  KL(P || beta P + (1 - beta) Q)
        skew_reverse_kl  KL(Q || beta Q + (1 - beta) P)
        tvd              sum_v |P_v - Q_v| / 2
        cross_entropy    -log Q[label], 0 where the label is -100; reads no teacher (give None)
    With `truncate` the entries that only one vocabulary has are left out of both softmaxes: of one
    tokenizer whose heads are padded to different sizes. Gradients go to student_hidden and
    student_weight. A row of weight 0 is never read; on a GPU it still takes its place in the
    products, since skipping it would wait for the device: leave out such rows before the call where
    their number is known. Raises ValueError for an unknown kind, unequal vocabularies or numbers of
    rows, beta outside (0, 1) for a mixture, labels missing or given to another kind. Agarwal et al.
    2024 (arXiv 2306.13649) for jsd, Ko et al. 2024 (arXiv 2402.03898) for the skewed ones.
    """
    check_positive("temperature", temperature)
    _check_kind(kind, beta, labels)
    check_rows(len(student_hidden), row_weight=row_weight, labels=labels, teacher=teacher_hidden)
    if kind != "cross_entropy":
        student_weight, teacher_weight = _same_vocabulary(student_weight, teacher_weight, truncate)
    check_head("student", student_logit_scale, student_soft_cap)
    check_head("teacher", teacher_logit_scale, teacher_soft_cap)
    given = student_hidden, student_weight, teacher_hidden, teacher_weight
    lacks = type_lacks(*(x.dtype for x in given if x is not None))
    return OPERATION(
        choose(backend, student_hidden, triton_lacks=lacks),
        *given,
        _keep(row_weight, labels),
        None if row_weight is None else row_weight.detach(),
        labels,
        kind=kind,
        beta=beta,
        temperature=temperature,
        student_scale=student_logit_scale,
        student_cap=student_soft_cap,
        teacher_scale=teacher_logit_scale,
        teacher_cap=teacher_soft_cap,
    )


def _eager(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [N, E]
    teacher_weight: Tensor | None,  # [V, E]
    keep: Tensor | None,  # [N] bool, None where all rows count
    row_weight: Tensor | None,  # [N]
    labels: Tensor | None,  # [N]
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_scale: float,
    student_cap: float | None,
    teacher_scale: float,
    teacher_cap: float | None,
) -> Tensor:  # scalar
    student_head = Head(student_scale, student_cap, temperature)
    teacher_head = Head(teacher_scale, teacher_cap, temperature)
    keep = keep_or_all(keep, student_hidden, 1)
    student = logits_of(drop_masked(student_hidden, keep), student_weight, student_head)
    if kind == "cross_entropy":
        rows = F.cross_entropy(student, labels, ignore_index=-100, reduction="none")
    else:
        hidden = drop_masked(teacher_hidden.detach(), keep)
        teacher = logits_of(hidden, teacher_weight.detach(), teacher_head)
        rows = divergence(kind, teacher, student, beta)
    weight = torch.ones_like(rows) if row_weight is None else row_weight
    return (rows * weight.to(rows.dtype)).sum()


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    # Imported here since triton need not be installed.
    from mlkd_kernels.triton.divergence import fused

    return streamed.linear_divergence(*tensors, divergences=fused, **options)


OPERATION = Operation(
    "linear_divergence",
    {"eager": _eager, "streamed": streamed.linear_divergence, "triton": _triton},
    "Tensor student_hidden, Tensor student_weight, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? keep, Tensor? row_weight, Tensor? labels, str kind, float beta, float temperature, "
    "float student_scale, float? student_cap, float teacher_scale, float? teacher_cap",
    leaves=2,
    like=lambda *tensors, **_: tensors[0].new_empty((), dtype=wide_type(*tensors[:4])),
    scalar=True,
)


def logits_of(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:  # [N, D], [V, D] -> [N, V]
    if head.soft_cap is None:
        return gram(hidden, weight, head.scale / head.temperature)
    logits = gram(hidden, weight, head.scale)
    return (logits / head.soft_cap).tanh() * (head.soft_cap / head.temperature)


def check_head(name: str, scale: float, soft_cap: float | None) -> None:
    check_positive(f"{name}_logit_scale", scale)
    if soft_cap is not None:
        check_positive(f"{name}_soft_cap", soft_cap)


def _keep(row_weight: Tensor | None, labels: Tensor | None) -> Tensor | None:  # -> [N] bool
    """Which rows are read; None for all."""
    if row_weight is None:
        return None if labels is None else labels != -100
    keep = row_weight != 0
    return keep if labels is None else keep & (labels != -100)


def divergence(
    kind: str, teacher: Tensor, student: Tensor, beta: float
) -> Tensor:  # [..., V] twice -> [...]
    """Of softmax(teacher) and softmax(student), by the kinds of `linear_divergence`."""
    if kind == "forward_kl":
        return row_kl(teacher, student)
    if kind == "reverse_kl":
        return row_kl(student, teacher)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    if kind == "jsd":
        mixture = _log_mixture(log_p, log_q, beta)
        return beta * row_kl(log_p, mixture) + (1 - beta) * row_kl(log_q, mixture)
    if kind == "skew_forward_kl":
        return row_kl(log_p, _log_mixture(log_p, log_q, beta))
    if kind == "skew_reverse_kl":
        return row_kl(log_q, _log_mixture(log_q, log_p, beta))
    assert kind == "tvd", kind
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _log_mixture(log_first: Tensor, log_second: Tensor, beta: float) -> Tensor:
    """log(beta * first + (1 - beta) * second), a mixture of probabilities."""
    return torch.logaddexp(log_first + math.log(beta), log_second + math.log1p(-beta))


def _check_kind(kind: str, beta: float, labels: Tensor | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; it must be one of {', '.join(KINDS)}.")
    check_beta(kind, beta)
    if (kind == "cross_entropy") != (labels is not None):
        raise ValueError(
            f"kind={kind!r} with labels {'missing' if labels is None else 'given'}; labels belong "
            "to cross_entropy and only to it. To leave rows out of another kind give row_weight "
            "0 there."
        )


def check_beta(kind: str, beta: float) -> None:
    if kind in MIXTURES and not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} with kind={kind!r}; it must lie between 0 and 1, both excluded. For the "
            "plain divergences use kind='forward_kl' or 'reverse_kl'."
        )


def check_rows(rows: int, **given: Tensor | None) -> None:
    for name, value in given.items():
        if value is not None and len(value) != rows:
            raise ValueError(
                f"the student has {rows} rows and {name} {len(value)}; they must be the same."
            )


def _same_vocabulary(
    student_weight: Tensor, teacher_weight: Tensor | None, truncate: bool
) -> tuple[Tensor, Tensor]:
    if teacher_weight is None:
        raise ValueError("no teacher is given; only kind='cross_entropy' reads none.")
    if truncate:
        both = min(len(student_weight), len(teacher_weight))
        return student_weight[:both], teacher_weight[:both]
    if len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"the student's vocabulary has {len(student_weight)} entries and the teacher's "
            f"{len(teacher_weight)}; they must be the same. If the same tokenizer made both and "
            "one is only padded, truncate=True leaves the other entries out."
        )
    return student_weight, teacher_weight
