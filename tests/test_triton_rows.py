"""The Triton kernels that work on rows of scores, beside the eager definitions in float64, in
Triton's interpreter on the CPU."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import FP16, FP32, check_parity, padding, randn, run
from torch import Tensor

from mlkd_kernels import info_nce, linear_divergence, relation_kl, similarity_kl

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton here")

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
# More than one block of rows and of columns, and no multiple of either.
LONG = 41


def pair(operation: Callable, *teacher: Tensor, **options: Any) -> tuple[Callable, Callable]:
    """The kernel and the definition as functions of what belongs to the student."""
    wide = [x.double() for x in teacher]
    wide_options = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }
    return (
        lambda *x: operation(*x, *teacher, **options, backend="triton"),
        lambda *x: operation(*x, *wide, **wide_options, backend="eager"),
    )


def check_wide_relation(
    dtype: torch.dtype, length: int, heads: int, widths: tuple[int, int], causal: bool, kind: str
) -> None:
    batch = 1 if length == LONG else 2
    student, teacher = (
        randn(batch, length, heads * width, seed=seed).to(dtype)
        for seed, width in enumerate(widths)
    )
    # So warm that no gradient is the rounding of 1 - 1.
    options = {"heads": heads, "mask": padding(kind, batch, length), "causal": causal}
    check_parity(pair(relation_kl, teacher, **options, temperature=4.0), [student])


@pytest.mark.parametrize(
    "case",
    [
        (FP32, 1, 1, (300, 260), False, "none"),
        (FP32, 33, 2, (260, 384), True, "left"),
        (FP16, 33, 1, (384, 24), False, "whole"),
        *((FP32, LONG, 1, (257, 384), causal, kind)
          for kind in ("none", "right", "holes") for causal in (False, True)),
    ],
    ids=str,
)  # fmt: skip
def test_wide_relation_kl_is_the_definition(interpreted: Callable, case: tuple) -> None:
    interpreted(check_wide_relation, *case)


def check_weighted_relation(widths: tuple[int, int]) -> None:
    student, teacher = (randn(2, 33, width, seed=seed) for seed, width in enumerate(widths))
    weight = randn(2, 33, seed=7).where(torch.arange(33) % 4 != 1, 0.0)
    options = {"heads": 1, "mask": padding("holes", 2, 33), "row_weight": weight}
    upstream = torch.tensor(1.5)
    check_parity(pair(relation_kl, teacher, **options, temperature=4.0), [student], weight=upstream)


@pytest.mark.parametrize("widths", [(24, 16), (260, 384)], ids=["kernel", "by rows"])
def test_weighted_relation_kl_is_the_definition(interpreted: Callable, widths: tuple) -> None:
    interpreted(check_weighted_relation, widths)


def check_similarity(
    dtype: torch.dtype, samples: int, normalize: bool, diagonal: bool, masked: bool
) -> None:
    student, teacher = randn(samples, 24).to(dtype), randn(samples, 40, seed=1).to(dtype)
    mask = torch.arange(samples) % 3 != 1 if masked else None
    # No softmax so sharp that its gradient is the rounding of 1 - 1.
    warm = 0.5 if normalize else 3.0
    options = {"temperature": warm, "normalize": normalize, "diagonal": diagonal, "mask": mask}
    check_parity(pair(similarity_kl, teacher, **options), [student])


@pytest.mark.parametrize("samples, masked", [(1, False), (5, True), (LONG, False), (LONG, True)])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_kl_is_the_definition(
    interpreted: Callable, samples: int, masked: bool, diagonal: bool, normalize: bool
) -> None:
    if samples == 1 and not diagonal:
        # No column is left: the definition's gradient is 0, and nothing to compare with.
        interpreted(check_no_columns)
    else:
        dtype = FP32 if normalize or masked else FP16
        interpreted(check_similarity, dtype, samples, normalize, diagonal, masked)


def check_no_columns() -> None:
    kernel, _ = pair(similarity_kl, randn(1, 40), diagonal=False)
    for zero in run(kernel, [randn(1, 24)], torch.ones(1)):
        assert zero.eq(0).all()


def heads(dtype: torch.dtype, rows: int, vocabulary: int, spread: float = 1.5) -> list[Tensor]:
    """Hidden states and output weights of student and teacher."""
    made = []
    for i, width in enumerate((16, 24)):
        made.append(randn(rows, width, seed=2 * i).to(dtype))
        made.append((spread * width**-0.5 * randn(vocabulary, width, seed=2 * i + 1)).to(dtype))
    return made


def check_divergence(
    kind: str, dtype: torch.dtype, vocabulary: int, weighted: bool, **options: Any
) -> None:
    rows = 11
    student, teacher = (heads(dtype, rows, vocabulary)[i : i + 2] for i in (0, 2))
    if weighted:
        options["row_weight"] = randn(rows, seed=7).where(torch.arange(rows) % 4 != 1, 0.0)
    if kind == "cross_entropy":
        options["labels"] = torch.arange(rows).where(torch.arange(rows) != 3, -100)
        teacher = []
        options |= {"teacher_hidden": None, "teacher_weight": None}
    tolerance = 1e-5 if dtype == FP32 else 1e-3
    # A gap of two probabilities that nearly cancel has the rounding of both.
    check_parity(
        pair(linear_divergence, *teacher, kind=kind, **options),
        student,
        gradient_within=tolerance,
        weight=torch.tensor(-0.7),
    )


@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy"])
@pytest.mark.parametrize("dtype, vocabulary", [(FP32, 100), (FP32, 17), (FP16, 64)], ids=str)
def test_linear_divergence_is_the_definition(
    interpreted: Callable, kind: str, dtype: torch.dtype, vocabulary: int
) -> None:
    interpreted(check_divergence, kind, dtype, vocabulary, weighted=False)
    interpreted(check_divergence, kind, dtype, vocabulary, weighted=True, temperature=2.0)


@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy"])
def test_soft_caps_and_scales(interpreted: Callable, kind: str) -> None:
    caps = {"student_soft_cap": 1.5, "student_logit_scale": 0.7, "temperature": 1.3}
    if kind != "cross_entropy":
        caps |= {"teacher_soft_cap": 2.5, "teacher_logit_scale": 1.4}
    interpreted(check_divergence, kind, FP32, 70, True, **caps)


@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_other_mixtures(interpreted: Callable, kind: str, beta: float) -> None:
    interpreted(check_divergence, kind, FP32, 70, True, beta=beta)


def check_far_apart(kind: str) -> None:
    """Logits of which the softmax underflows on either side."""
    hidden = torch.eye(4) * 300
    student, teacher = torch.eye(40)[:, :4], torch.eye(40)[:, :4].flip(1)
    kernel, eager = pair(linear_divergence, hidden, teacher, kind=kind)
    check_parity((kernel, eager), [hidden, student], weight=torch.tensor(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_far_apart(interpreted: Callable, kind: str) -> None:
    interpreted(check_far_apart, kind)


def check_perfect(kind: str) -> None:
    hidden, weight, _, _ = heads(FP32, 9, 70)
    kernel, _ = pair(linear_divergence, hidden.clone(), weight.clone(), kind=kind)
    for zero in run(kernel, [hidden, weight], torch.tensor(1.0)):
        assert zero.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_student_has_exactly_no_divergence(interpreted: Callable, kind: str) -> None:
    interpreted(check_perfect, kind)


def check_frozen(kind: str) -> None:
    student, teacher = (heads(FP32, 9, 70)[i : i + 2] for i in (0, 2))
    kernel, _ = pair(linear_divergence, *teacher, kind=kind)
    both = run(kernel, student, torch.tensor(1.0))
    for fixed in range(2):
        frozen = student[fixed].detach()

        def one(x: Tensor, fixed: int = fixed, frozen: Tensor = frozen) -> Tensor:
            return kernel(frozen, x) if fixed == 0 else kernel(x, frozen)

        value, grad = run(one, [student[1 - fixed]], torch.tensor(1.0))
        assert torch.equal(value, both[0]) and torch.equal(grad, both[2 - fixed])
    with torch.no_grad():
        assert torch.equal(kernel(*student), both[0])


def test_a_frozen_head_or_hidden_state(interpreted: Callable) -> None:
    interpreted(check_frozen, "jsd")


def check_unread(kind: str) -> None:
    """What stands in rows of weight 0 must not matter, be it NaN."""
    weight = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    results = []
    for filler in (0.0, float("nan")):
        student, student_head, teacher, teacher_head = heads(FP32, 5, 70)
        student, teacher = (x.where(weight[:, None] > 0, filler) for x in (student, teacher))
        kernel, _ = pair(linear_divergence, teacher, teacher_head, kind=kind, row_weight=weight)
        results.append(run(kernel, [student, student_head], torch.tensor(1.0)))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


@pytest.mark.parametrize("kind", ["forward_kl", "tvd"])
def test_rows_of_weight_zero_are_never_read(interpreted: Callable, kind: str) -> None:
    interpreted(check_unread, kind)


def check_unread_without_skipping(kind: str) -> None:
    from mlkd_kernels.streamed import blocks

    cpu, blocks.CPU = blocks.CPU, "no device of this name"
    try:
        check_unread(kind)
        check_divergence(kind, FP32, 70, weighted=True)
    finally:
        blocks.CPU = cpu


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_rows_that_stay_in_their_place(interpreted: Callable, kind: str) -> None:
    """As on a GPU, where the number of rows that count would have to be waited for."""
    interpreted(check_unread_without_skipping, kind)


def check_contrast(
    samples: int, labels: list[int] | None, masked: bool, normalize: bool = True
) -> None:
    student, teacher = randn(samples, 24), randn(samples, 24, seed=1)
    options = {
        "labels": None if labels is None else torch.tensor(labels).repeat(samples)[:samples],
        "mask": torch.arange(samples) % 3 != 1 if masked else None,
        "normalize": normalize,
        "temperature": 0.5 if normalize else 20.0,
    }
    check_parity(pair(info_nce, teacher, **options), [student])


@pytest.mark.parametrize("labels", [None, [0, 1, -100, 0, 2]])
@pytest.mark.parametrize("samples, masked", [(2, False), (5, True), (LONG, False), (LONG, True)])
def test_info_nce_is_the_definition(
    interpreted: Callable, samples: int, masked: bool, labels: list[int] | None
) -> None:
    interpreted(check_contrast, samples, labels, masked, normalize=samples != 5)


def operations() -> dict[str, tuple[Callable, list[Tensor]]]:
    student, teacher = (heads(FP32, 9, 70)[i : i + 2] for i in (0, 2))
    tokens = randn(1, 33, 300), randn(1, 33, 260, seed=1)
    samples = randn(18, 24), randn(18, 24, seed=1)
    return {
        "relation_kl": (pair(relation_kl, tokens[1], heads=1)[0], [tokens[0]]),
        "similarity_kl": (pair(similarity_kl, samples[1])[0], [samples[0]]),
        "info_nce": (pair(info_nce, samples[1])[0], [samples[0]]),
        "linear_divergence": (pair(linear_divergence, *teacher, kind="jsd")[0], student),
    }


def check_repeats(name: str) -> None:
    function, inputs = operations()[name]
    before = [x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    rows = function(*leaves)
    once, twice = (torch.autograd.grad(rows.sum(), leaves, retain_graph=True) for _ in range(2))
    scaled = torch.autograd.grad(rows.sum() * -2, leaves)
    for one, two, other in zip(once, twice, scaled, strict=True):
        assert torch.equal(one, two) and torch.equal(-2 * one, other)
    assert torch.equal(rows, function(*leaves))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", ["relation_kl", "similarity_kl", "info_nce", "linear_divergence"])
def test_twice_is_the_same_to_the_bit(interpreted: Callable, name: str) -> None:
    interpreted(check_repeats, name)
