"""The definitions of mlkd_kernels, written here a second time with plain loops in float64."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import mlkd_kernels
from mlkd_kernels import (
    attention_kl,
    info_nce,
    linear_divergence,
    relation_kl,
    similarity_kl,
    similarity_mse,
)
from mlkd_kernels._backend import choose

KL_KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")

# Five tokens: enough for padding left, right and in between with several real tokens beside it.
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]],
    "whole": [[0, 0, 0, 0, 0], [1, 1, 0, 1, 1]],
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bools(rows: list | None) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.bool)


def softmax_loop(scores: list[Tensor]) -> list[Tensor]:
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def kl_loop(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), torch.zeros(()).double())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a @ a).sqrt() / (b @ b).sqrt()


def check_same(actual: Callable, expected: Callable, *inputs: Tensor) -> None:
    """Equal values, and equal gradients of a sum in which every row weighs differently."""
    results = []
    for function in (actual, expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        weight = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
        grads = torch.autograd.grad((value * weight).sum(), leaves)
        results.append((value.detach(), *grads))
    assert results[0][0].abs().max() > 1e-6, "the comparison must not be of zeros"
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def token_kl_loop(
    teacher: Callable, student: Callable, shape: tuple, mask: Tensor | None, causal: bool
) -> Tensor:
    """rows [B, R, L] of KL over the real keys, of scores given as functions of (b, r, i, j)."""
    batch, heads, length = shape
    rows = []
    for b in range(batch):
        for r in range(heads):
            for i in range(length):
                keys = [
                    j
                    for j in range(length)
                    if (mask is None or (mask[b, i] and mask[b, j])) and (j <= i or not causal)
                ]
                p = softmax_loop([teacher(b, r, i, j) for j in keys])
                q = softmax_loop([student(b, r, i, j) for j in keys])
                rows.append(kl_loop(p, q))
    return torch.stack(rows).view(shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("options", [{}, {"student_scale": 0.3, "teacher_scale": 0.9}])
def test_relation_kl_is_its_definition(name: str, causal: bool, options: dict) -> None:
    mask, temperature, heads = bools(MASKS[name]), 1.7, 3
    # Widths 6 and 12 in 3 heads: blocks of 2 and 4, so a mix-up of widths or scales cannot pass.
    student, teacher = randn(2, 5, 6), randn(2, 5, 12, seed=1)

    def scores(x: Tensor, scale: float) -> Callable:
        x = x.view(2, 5, heads, -1)
        return lambda b, r, i, j: scale * (x[b, i, r] @ x[b, j, r]) / temperature

    check_same(
        lambda s: relation_kl(
            s, teacher, heads=heads, mask=mask, causal=causal, temperature=temperature, **options
        ),
        lambda s: token_kl_loop(
            scores(teacher, options.get("teacher_scale", 1 / 2)),
            scores(s, options.get("student_scale", 1 / math.sqrt(2))),
            (2, heads, 5),
            mask,
            causal,
        ),
        student,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("options", [{}, {"student_scale": 0.3, "teacher_scale": 0.9}])
def test_attention_kl_is_its_definition(name: str, causal: bool, options: dict) -> None:
    mask = bools(MASKS[name])
    # 4 query heads over 2 key heads of the student and 1 of the teacher: grouped and multi-query.
    student = randn(2, 4, 5, 2), randn(2, 2, 5, 2, seed=1)
    teacher = randn(2, 4, 5, 4, seed=2), randn(2, 1, 5, 4, seed=3)

    def scores(query: Tensor, key: Tensor, scale: float) -> Callable:
        share = query.shape[1] // key.shape[1]
        return lambda b, h, i, j: scale * (query[b, h, i] @ key[b, h // share, j])

    check_same(
        lambda q, k: attention_kl(q, k, *teacher, mask=mask, causal=causal, **options),
        lambda q, k: token_kl_loop(
            scores(*teacher, options.get("teacher_scale", 1 / 2)),
            scores(q, k, options.get("student_scale", 1 / math.sqrt(2))),
            (2, 4, 5),
            mask,
            causal,
        ),
        *student,
    )


# Four samples, so that one masked sample and no diagonal still leave two columns.
SAMPLES = 4


@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_mse_is_its_definition(normalize: bool) -> None:
    student, teacher = randn(SAMPLES, 3), randn(SAMPLES, 5, seed=1)
    score = cosine if normalize else torch.dot

    def loop(s: Tensor) -> Tensor:
        pairs = [(i, j) for i in range(SAMPLES) for j in range(SAMPLES)]
        gaps = [score(s[i], s[j]) - score(teacher[i], teacher[j]) for i, j in pairs]
        return sum(gap**2 for gap in gaps) / SAMPLES**2

    check_same(lambda s: similarity_mse(s, teacher, normalize=normalize), loop, student)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1], [0, 1, 0, 0]])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_kl_is_its_definition(normalize: bool, diagonal: bool, mask: list) -> None:
    student, teacher, temperature = randn(SAMPLES, 3), randn(SAMPLES, 5, seed=1), 0.6
    keep = mask or [1] * SAMPLES

    def score(a: Tensor, b: Tensor) -> Tensor:
        return (cosine(a, b) if normalize else a @ b / math.sqrt(len(a))) / temperature

    def loop(s: Tensor) -> Tensor:
        rows = []
        for i in range(SAMPLES):
            columns = [j for j in range(SAMPLES) if keep[i] and keep[j] and (diagonal or j != i)]
            p = softmax_loop([score(teacher[i], teacher[j]) for j in columns])
            q = softmax_loop([score(s[i], s[j]) for j in columns])
            rows.append(kl_loop(p, q) + 0 * s.sum())
        return torch.stack(rows)

    def kernel(s: Tensor) -> Tensor:
        options = {"normalize": normalize, "diagonal": diagonal, "temperature": temperature}
        return similarity_kl(s, teacher, mask=bools(mask), **options)

    if sum(keep) == 1:
        # One column, or none: both distributions are the same, whatever the vectors are.
        check_zero(kernel, student)
    else:
        check_same(kernel, loop, student)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1]])
@pytest.mark.parametrize("labels", [None, [7, 7, 2, 7], [-100, 1, -100, 1]])
@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_is_its_definition(normalize: bool, labels: list, mask: list) -> None:
    student, teacher, temperature = randn(SAMPLES, 3), randn(SAMPLES, 3, seed=1), 0.7
    keep = mask or [1] * SAMPLES

    def loop(s: Tensor) -> Tensor:
        vectors = [*s, *teacher]
        score = cosine if normalize else torch.dot

        def anchor(i: int) -> Tensor:
            others = [a for a in range(2 * SAMPLES) if a != i and keep[a % SAMPLES]]
            power = {a: (score(vectors[i], vectors[a]) / temperature).exp() for a in others}
            label = labels[i % SAMPLES] if labels else -100
            positives = [
                p
                for p in others
                if p % SAMPLES == i % SAMPLES or (label != -100 and labels[p % SAMPLES] == label)
            ]
            return -sum((power[p] / sum(power.values())).log() for p in positives) / len(positives)

        rows = [
            (anchor(n) + anchor(n + SAMPLES)) / 2 if keep[n] else 0 * s.sum()
            for n in range(SAMPLES)
        ]
        return torch.stack(rows)

    check_same(
        lambda s: info_nce(
            s,
            teacher,
            labels=None if labels is None else torch.tensor(labels),
            temperature=temperature,
            mask=bools(mask),
            normalize=normalize,
        ),
        loop,
        student,
    )


# Three rows of which one is left out, five tokens; widths 2 and 4.
HEADS = randn(3, 2), randn(5, 2, seed=1), randn(3, 4, seed=2), randn(5, 4, seed=3)
ROW_WEIGHT = torch.tensor([0.5, 0.0, 3.0])


def divergence_loop(kind: str, p: list[Tensor], q: list[Tensor], beta: float) -> Tensor:
    def mix(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [beta * x + (1 - beta) * y for x, y in zip(a, b, strict=True)]

    match kind:
        case "forward_kl":
            return kl_loop(p, q)
        case "reverse_kl":
            return kl_loop(q, p)
        case "jsd":
            return beta * kl_loop(p, mix(p, q)) + (1 - beta) * kl_loop(q, mix(p, q))
        case "skew_forward_kl":
            return kl_loop(p, mix(p, q))
        case "skew_reverse_kl":
            return kl_loop(q, mix(q, p))
        case "tvd":
            return sum((x - y).abs() for x, y in zip(p, q, strict=True)) / 2


@pytest.mark.parametrize("kind", KL_KINDS)
def test_linear_divergence_is_its_definition(kind: str) -> None:
    temperature, beta = 1.3, 0.2

    def loop(hidden: Tensor, weight: Tensor) -> Tensor:
        total = 0
        for n in range(3):
            z_teacher = [HEADS[2][n] @ HEADS[3][v] / temperature for v in range(5)]
            z_student = [hidden[n] @ weight[v] / temperature for v in range(5)]
            p, q = softmax_loop(z_teacher), softmax_loop(z_student)
            total = total + ROW_WEIGHT[n] * divergence_loop(kind, p, q, beta)
        return total

    options = {"temperature": temperature, "beta": beta, "row_weight": ROW_WEIGHT}
    check_same(
        lambda h, w: linear_divergence(h, w, *HEADS[2:], kind=kind, **options), loop, *HEADS[:2]
    )


def test_linear_cross_entropy_is_its_definition() -> None:
    labels, temperature = [4, 1, -100], 1.3

    def loop(hidden: Tensor, weight: Tensor) -> Tensor:
        z = [hidden[0] @ weight[v] / temperature for v in range(5)]
        return -0.5 * softmax_loop(z)[labels[0]].log()

    options = {"temperature": temperature, "row_weight": ROW_WEIGHT, "labels": torch.tensor(labels)}
    check_same(
        lambda h, w: linear_divergence(h, w, None, None, kind="cross_entropy", **options),
        loop,
        *HEADS[:2],
    )


@pytest.mark.parametrize("kind", KL_KINDS)
def test_linear_divergence_gradcheck(kind: str) -> None:
    student = [x.clone().requires_grad_() for x in HEADS[:2]]
    assert torch.autograd.gradcheck(
        lambda h, w: linear_divergence(h, w, *HEADS[2:], kind=kind, beta=0.3), student
    )


@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("backend", ["eager", "streamed"])
def test_truncation_leaves_out_what_one_vocabulary_lacks(longer: str, backend: str) -> None:
    sizes = (9, 7) if longer == "student" else (7, 9)
    hidden = randn(5, 4), randn(5, 6, seed=1)
    student, teacher = randn(sizes[0], 4, seed=2), randn(sizes[1], 6, seed=3)
    given = [x.requires_grad_() for x in (hidden[0], student)]
    cut = [x.detach()[:7] if x is student else x.detach() for x in given]
    value = linear_divergence(
        *given, hidden[1], teacher, kind="jsd", truncate=True, backend=backend
    )
    cut = [x.requires_grad_() for x in cut]
    expected = linear_divergence(*cut, hidden[1], teacher[:7], kind="jsd", backend=backend)
    assert torch.equal(value, expected)
    found, wanted = torch.autograd.grad(value, given), torch.autograd.grad(expected, cut)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1][:7], wanted[1])
    assert found[1][7:].eq(0).all()


def test_mixtures_tend_to_the_plain_divergences() -> None:
    def divergence(kind: str, beta: float = 0.5) -> float:
        return linear_divergence(*HEADS, kind=kind, beta=beta).item()

    small, forward, reverse = 1e-6, divergence("forward_kl"), divergence("reverse_kl")
    assert abs(forward - reverse) > 0.01
    # beta is the teacher's share: near 0 the mixture is the student, near 1 the teacher.
    assert divergence("jsd", small) / small == pytest.approx(forward, rel=1e-4)
    assert divergence("jsd", 1 - small) / small == pytest.approx(reverse, rel=1e-4)
    assert divergence("skew_forward_kl", small) == pytest.approx(forward, rel=1e-4)
    assert divergence("skew_reverse_kl", small) == pytest.approx(reverse, rel=1e-4)
    assert divergence("skew_forward_kl", 1 - small) == pytest.approx(0, abs=1e-4)
    assert divergence("skew_reverse_kl", 1 - small) == pytest.approx(0, abs=1e-4)


def test_extreme_logits_stay_finite() -> None:
    # Probabilities underflow in fp32 from a gap of about 104 on; every one but the largest does.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [-200.0], [-300.0]])
    for kind in KL_KINDS:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = linear_divergence(*leaves, hidden, weight.flip(0), kind=kind)
        grads = torch.autograd.grad(value, leaves)
        assert value.isfinite() and all(grad.isfinite().all() for grad in grads), kind
        assert value > 0.4, kind


def check_zero(kernel: Callable, *inputs: Tensor) -> None:
    """Exactly 0 in value and gradient, and still a function of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = kernel(*leaves)
    grads = torch.autograd.grad(value.sum(), leaves)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


X = randn(2, 5, 6)


def one_head(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    # Values that bf16 holds exactly, so that the weight is the same in every precision.
    weight = X[0].bfloat16().to(student.dtype)
    return linear_divergence(student, weight, teacher, weight, kind=kind)


KERNELS = {
    "relation_kl": (lambda s, t, **o: relation_kl(s, t, heads=2, **o), X),
    "attention_kl": (lambda s, t, **o: attention_kl(s, s, t, t, **o), randn(2, 2, 5, 3)),
    "similarity_kl": (similarity_kl, randn(5, 6)),
    "similarity_mse": (similarity_mse, randn(5, 6)),
    "info_nce": (info_nce, randn(5, 6)),
    **{kind: (partial(one_head, kind=kind), randn(5, 6)) for kind in KL_KINDS},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["relation_kl", "attention_kl", "similarity_kl", "similarity_mse"])
def test_a_perfect_student_has_no_loss_and_no_gradient(name: str, dtype: torch.dtype) -> None:
    kernel, x = KERNELS[name]
    check_zero(lambda s: kernel(s, x.to(dtype)), x.to(dtype))


@pytest.mark.parametrize("kind", KL_KINDS)
def test_a_perfect_student_has_no_divergence(kind: str) -> None:
    student = [x.clone().requires_grad_() for x in (HEADS[0], HEADS[1])]
    value = linear_divergence(*student, *HEADS[:2], kind=kind)
    grads = torch.autograd.grad(value, student)
    # A mixture passes through logaddexp, whose gradient sums to 1 only up to rounding.
    for x in (value, *grads):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_stay_out_of_the_teacher(name: str) -> None:
    kernel, x = KERNELS[name]
    student, teacher = x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()
    kernel(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_gradients_stay_out_of_the_teachers_head() -> None:
    teacher = [x.clone().requires_grad_() for x in HEADS[2:]]
    student = [x.clone().requires_grad_() for x in HEADS[:2]]
    linear_divergence(*student, *teacher, kind="jsd").backward()
    assert all(x.grad is not None for x in student) and all(x.grad is None for x in teacher)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arithmetic_is_fp32_also_under_autocast(name: str, dtype: torch.dtype) -> None:
    kernel, x = KERNELS[name]
    student, teacher = x.to(dtype), x.flip(0).to(dtype)
    plain = kernel(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kernel(student, teacher)
    assert plain.dtype == torch.float32 and torch.equal(plain, cast)
    wide = kernel(student.double(), teacher.double())
    torch.testing.assert_close(plain.double(), wide, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["relation_kl", "attention_kl"])
def test_padding_is_never_read(kernel: str, causal: bool, name: str) -> None:
    mask = bools(MASKS[name])
    function, x = KERNELS[kernel]
    real = mask[..., None] if kernel == "relation_kl" else mask[:, None, :, None]
    inputs = [
        torch.where(real, y, poison).requires_grad_()
        for y, poison in ((x, math.nan), (x.flip(0), math.inf))
    ]
    rows = function(*inputs, mask=mask, causal=causal)
    rows.sum().backward()
    assert torch.equal(rows, rows.masked_fill(~mask[:, None], 0))
    grad = inputs[0].grad
    assert torch.equal(grad, grad.where(real, 0.0))
    for b in range(2):
        if not mask[b].any():
            continue
        # The real tokens alone, without any padding, must give the same rows.
        axis = 1 if kernel == "relation_kl" else 2
        alone = [y[b : b + 1].index_select(axis, mask[b].nonzero()[:, 0]) for y in inputs]
        expected = function(*alone, causal=causal)
        torch.testing.assert_close(rows[b : b + 1, :, mask[b]], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", [similarity_kl, info_nce])
def test_masked_samples_are_never_read(kernel: Callable) -> None:
    mask = torch.tensor([True, False, True, True])
    student, teacher = randn(SAMPLES, 3), randn(SAMPLES, 3, seed=1)
    student[1], teacher[1] = math.nan, math.inf
    student.requires_grad_()
    rows = kernel(student, teacher, mask=mask)
    rows.sum().backward()
    torch.testing.assert_close(rows[mask], kernel(student[mask], teacher[mask]))
    assert rows[1] == 0 and torch.equal(student.grad[1], torch.zeros(3).double())
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", [*KL_KINDS, "cross_entropy"])
def test_rows_of_weight_zero_are_never_read(kind: str) -> None:
    student, teacher = HEADS[0].clone(), HEADS[2].clone()
    student[1], teacher[1] = math.nan, math.nan
    weight = HEADS[1].clone().requires_grad_()
    student.requires_grad_()
    options = {"labels": torch.tensor([0, 1, 2])} if kind == "cross_entropy" else {}
    heads = (student, weight, teacher, HEADS[3])
    value = linear_divergence(*heads, kind=kind, row_weight=ROW_WEIGHT, **options)
    value.backward()
    assert value > 0 and student.grad.isfinite().all() and weight.grad.isfinite().all()


def test_ignored_labels_are_never_read() -> None:
    hidden = HEADS[0].clone()
    hidden[2] = math.nan
    weight = HEADS[1].clone().requires_grad_()
    labels = torch.tensor([4, 1, -100])
    value = linear_divergence(hidden, weight, None, None, kind="cross_entropy", labels=labels)
    value.backward()
    assert value > 0 and weight.grad.isfinite().all()


def test_nothing_but_padding_is_zero_and_part_of_the_graph() -> None:
    x, samples = torch.full((2, 5, 6), math.nan), torch.full((5, 6), math.nan)
    heads = torch.full((2, 2, 5, 3), math.nan)
    tokens, none = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    check_zero(lambda s: relation_kl(s, x, heads=2, mask=tokens), x)
    check_zero(lambda s: attention_kl(s, s, heads, heads, mask=tokens), heads)
    check_zero(lambda s: similarity_kl(s, samples, mask=none), samples)
    check_zero(lambda s: info_nce(s, samples, mask=none), samples)
    weight = torch.ones(7, 6)
    for kind in KL_KINDS:
        options = {"kind": kind, "row_weight": torch.zeros(5)}
        check_zero(lambda s, o=options: linear_divergence(s, weight, samples, weight, **o), samples)


MASK = bools(MASKS["right"])
CHANGES = {
    "relation_kl": [
        {"mask": MASK},
        {"causal": True},
        {"student_scale": 0.1},
        {"teacher_scale": 0.1},
        {"temperature": 2.0},
        {"heads": 3},
    ],
    "attention_kl": [
        {"mask": MASK},
        {"causal": True},
        {"student_scale": 0.1},
        {"teacher_scale": 0.1},
    ],
    "similarity_mse": [{"normalize": False}],
    "similarity_kl": [
        {"temperature": 2.0},
        {"normalize": False},
        {"mask": MASK[0]},
        {"diagonal": False},
    ],
    "info_nce": [
        {"labels": torch.tensor([1, 1, 2, 2, 2])},
        {"temperature": 2.0},
        {"mask": MASK[0]},
        {"normalize": False},
    ],
    "linear_divergence": [
        {"kind": "reverse_kl"},
        {"temperature": 2.0},
        {"row_weight": torch.linspace(0, 1, 5)},
        {"kind": "skew_forward_kl", "beta": 0.1},
        {"kind": "skew_forward_kl", "beta": 0.9},
    ],
}

# similarity_mse has one form only.
WITH_BACKEND = [name for name in CHANGES if name != "similarity_mse"]


def call(name: str, **options: object) -> Tensor:
    x = randn(5, 6), randn(5, 6, seed=1)
    tokens = randn(2, 5, 6), randn(2, 5, 6, seed=1)
    heads = [randn(2, 2, 5, 3, seed=seed) for seed in range(4)]
    return {
        "relation_kl": lambda **o: relation_kl(*tokens, **{"heads": 2, **o}),
        "attention_kl": lambda **o: attention_kl(*heads, **o),
        "similarity_mse": lambda **o: similarity_mse(*x, **o),
        "similarity_kl": lambda **o: similarity_kl(*x, **o),
        "info_nce": lambda **o: info_nce(*x, **o),
        "linear_divergence": lambda **o: linear_divergence(
            x[0], randn(7, 6, seed=2), x[1], randn(7, 6, seed=3), **{"kind": "forward_kl", **o}
        ),
    }[name](**options)


@pytest.mark.parametrize("name", CHANGES)
def test_every_keyword_changes_the_value(name: str) -> None:
    sums = [call(name, **options).sum().item() for options in ({}, *CHANGES[name])]
    gaps = [abs(a - b) for i, a in enumerate(sums) for b in sums[:i]]
    assert min(gaps) > 1e-4, sums


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_auto_is_a_backend_that_is_available(name: str) -> None:
    chosen = choose("auto")
    assert mlkd_kernels.backends()[chosen] == "available"
    assert torch.equal(call(name, backend="auto"), call(name, backend=chosen))


def test_backends_that_cannot_run_are_refused_with_the_reason() -> None:
    states = mlkd_kernels.backends()
    assert set(states) == {"eager", "streamed", "triton"} and states["eager"] == "available"
    for name in [*(name for name, state in states.items() if state != "available"), "cuda"]:
        for operation in WITH_BACKEND:
            with pytest.raises(ValueError, match=f"'{name}'.*use one of: auto.*eager") as error:
                call(operation, backend=name)
            assert states.get(name, "") in str(error.value)


REFUSED = {
    "6 is not divisible by heads=4": lambda: call("relation_kl", heads=4),
    "heads=0": lambda: call("relation_kl", heads=0),
    "temperature=0.*greater": lambda: call("relation_kl", temperature=0.0),
    "temperature=-1.*greater": lambda: call("info_nce", temperature=-1.0),
    r"int64.*\(2, 5\).*attention_mask.bool": lambda: call("relation_kl", mask=MASK.long()),
    r"\(2, 4\).*\(2, 5\)": lambda: call("attention_kl", mask=MASK[:, :4]),
    r"\(2, 5, 6\).*\(2, 4, 6\)": lambda: relation_kl(X, X[:, :4], heads=2),
    r"\(1, 4, 5, 2\).*\(1, 2, 5, 2\).*relation_kl": lambda: attention_kl(
        *(randn(1, h, 5, 2) for h in (4, 4, 2, 2))
    ),
    r"student's queries.*\(1, 4, 5, 2\).*\(1, 3, 5, 2\)": lambda: attention_kl(
        *(randn(1, h, 5, 2) for h in (4, 3, 4, 4))
    ),
    r"\(5, 3\).*\(4, 3\)": lambda: similarity_mse(randn(5, 3), randn(4, 3)),
    r"\(5, 3\).*\(4, 2\)": lambda: similarity_kl(randn(5, 3), randn(4, 2)),
    r"\(5, 3\).*\(5, 4\).*[Pp]roject": lambda: info_nce(randn(5, 3), randn(5, 4)),
    r"labels are \(4,\).*5": lambda: call("info_nce", labels=torch.zeros(4)),
    "'kld'.*forward_kl.*tvd": lambda: call("linear_divergence", kind="kld"),
    "beta=0.*'jsd'": lambda: call("linear_divergence", kind="jsd", beta=0.0),
    "beta=1.*'skew_reverse_kl'": lambda: call(
        "linear_divergence", kind="skew_reverse_kl", beta=1.0
    ),
    "labels missing": lambda: call("linear_divergence", kind="cross_entropy"),
    "labels given": lambda: call("linear_divergence", labels=torch.zeros(5).long()),
    "5 rows and row_weight 4": lambda: call("linear_divergence", row_weight=torch.ones(4)),
    "3 rows and teacher 2": lambda: linear_divergence(
        *HEADS[:2], HEADS[2][:2], HEADS[3], kind="tvd"
    ),
    "5 entries and the teacher's 4": lambda: linear_divergence(
        *HEADS[:3], HEADS[3][:4], kind="tvd"
    ),
    "no teacher": lambda: linear_divergence(*HEADS[:2], None, None, kind="tvd"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_with_what_was_given(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


GROUPED = {
    "similarity_mse": similarity_mse,
    "similarity_mse plain": lambda s, t, group, **_: similarity_mse(
        s, t, normalize=False, group=group
    ),
    "similarity_kl": similarity_kl,
    "similarity_kl options": lambda s, t, group, mask, labels: similarity_kl(
        s, t, mask=mask, diagonal=False, normalize=False, temperature=0.5, group=group
    ),
    "info_nce": info_nce,
    "info_nce options": lambda s, t, group, mask, labels: info_nce(
        s, t, labels=labels, mask=mask, group=group
    ),
}


def grouped(name: str, part: slice, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Rows of the samples in `part` of a batch of 6, and their gradient, each row weighing
    differently."""
    student, teacher = randn(6, 3)[part].requires_grad_(), randn(6, 3, seed=1)[part]
    options = {}
    if "options" in name:
        # A class on both ranks, one on the second only, one sample without; one masked sample each.
        options["labels"] = torch.tensor([1, 2, -100, 2, 3, 3])[part]
        options["mask"] = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)[part]
    rows = GROUPED[name](student, teacher, group=group, **options)
    weight = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[part] if rows.ndim else 1.0
    (rows * weight).sum().backward()
    return rows.detach(), student.grad


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = {"init_method": f"file://{folder}/init", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **init)
    part = slice(3 * rank, 3 * rank + 3)
    results = {name: grouped(name, part, dist.group.WORLD) for name in GROUPED}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_group_sees_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in GROUPED:
        rows, grad = grouped(name, slice(0, 6), None)
        for rank, results in enumerate(ranks):
            expected = rows[3 * rank : 3 * rank + 3] if rows.ndim else rows
            torch.testing.assert_close(results[name][0], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            torch.cat([results[name][1] for results in ranks]), grad, rtol=1e-10, atol=1e-13
        )
