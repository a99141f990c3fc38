"""A teacher's likeliest entries and one bucket of all others: the definition in plain loops, the
whole divergence at k = V, and the streamed backend against the eager one."""

import math
from typing import Any

import pytest
import torch
from test_compiled_kernels import check_operator, operation
from test_kernels import KL_KINDS, check_same, divergence_loop, softmax_loop
from test_streamed import check_parity, device_path, randn, results, small_blocks
from torch import Tensor

from mlkd_kernels import linear_divergence, top_k_divergence

__all__ = ["device_path", "small_blocks"]

# More than two chunks of 4 rows; 9 entries.
ROWS, VOCABULARY = 11, 9
HIDDEN, HEAD = randn(ROWS, 4), randn(VOCABULARY, 4, seed=1)
TEACHER = randn(ROWS, 3, seed=2), randn(VOCABULARY, 3, seed=3)
TEMPERATURE = 1.3
ROW_WEIGHT = torch.arange(ROWS).double() % 3


def stored(k: int, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is kept of the teacher's rows, less a constant that differs from row to row."""
    logits = TEACHER[0] @ TEACHER[1].mT / temperature - torch.arange(ROWS).unsqueeze(1)
    scores, ids = logits.topk(k)
    if k == VOCABULARY:
        return scores, ids, None
    return scores, ids, logits.scatter(1, ids, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_it_is_its_definition(kind: str) -> None:
    """Of the k + 1 probabilities, summed up one by one from the whole distributions."""
    k, beta = 3, 0.2
    ids = stored(k)[1].tolist()

    def buckets(logits: list[Tensor], row: int) -> list[Tensor]:
        all_of_it = softmax_loop(logits)
        others = [v for v in range(VOCABULARY) if v not in ids[row]]
        return [all_of_it[v] for v in ids[row]] + [sum(all_of_it[v] for v in others)]

    def loop(hidden: Tensor, weight: Tensor) -> Tensor:
        total = 0
        for n in range(ROWS):
            z_teacher = [TEACHER[0][n] @ TEACHER[1][v] / TEMPERATURE for v in range(VOCABULARY)]
            z_student = [hidden[n] @ weight[v] / TEMPERATURE for v in range(VOCABULARY)]
            p, q = buckets(z_teacher, n), buckets(z_student, n)
            total = total + ROW_WEIGHT[n] * divergence_loop(kind, p, q, beta)
        return total

    options = {"temperature": TEMPERATURE, "beta": beta, "row_weight": ROW_WEIGHT}
    check_same(
        lambda h, w: top_k_divergence(h, w, *stored(k), kind=kind, **options), loop, HIDDEN, HEAD
    )


@pytest.mark.parametrize("backend", ["eager", "streamed"])
@pytest.mark.parametrize("kind", KL_KINDS)
def test_with_every_entry_it_is_the_whole_divergence(kind: str, backend: str) -> None:
    options = {"kind": kind, "temperature": TEMPERATURE, "beta": 0.2, "row_weight": ROW_WEIGHT}
    options |= {"student_soft_cap": 1.5, "student_logit_scale": 0.5}
    kept = results(
        lambda h, w, backend: top_k_divergence(
            h, w, *stored(VOCABULARY), backend=backend, **options
        ),
        backend,
        [HIDDEN, HEAD],
    )
    whole = results(
        lambda h, w, backend: linear_divergence(h, w, *TEACHER, backend=backend, **options),
        backend,
        [HIDDEN, HEAD],
    )
    for one, other in zip(kept, whole, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_more_entries_tell_more_and_never_too_much(kind: str) -> None:
    options = {"kind": kind, "temperature": TEMPERATURE, "beta": 0.2}
    found = [
        top_k_divergence(HIDDEN, HEAD, *stored(k), **options).item()
        for k in range(1, VOCABULARY + 1)
    ]
    whole = linear_divergence(HIDDEN, HEAD, *TEACHER, **options).item()
    assert found == sorted(found) and found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-12)


CHANGES = {
    "plain": {},
    "weighted": {"row_weight": ROW_WEIGHT},
    "capped": {"student_soft_cap": 1.5},
    "both": {"student_soft_cap": 1.5, "student_logit_scale": 0.5, "row_weight": ROW_WEIGHT},
}


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KL_KINDS)
def test_streamed_is_eager(kind: str, change: str, k: int, device_path: None) -> None:
    options: dict[str, Any] = {"kind": kind, "temperature": TEMPERATURE, "beta": 0.2}
    check_parity(
        lambda h, w, **o: top_k_divergence(h, w, *stored(k), **options, **CHANGES[change], **o),
        HIDDEN,
        HEAD,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_is_eager_in_other_precisions(dtype: torch.dtype) -> None:
    given = HIDDEN.to(dtype), HEAD.to(dtype)
    kept = [x if x.dtype == torch.int64 else x.float() for x in stored(4)]
    check_parity(
        lambda h, w, **o: top_k_divergence(h, w, *kept, kind="forward_kl", **o),
        *given,
        rtol=2e-5 if dtype == torch.float32 else 1e-2,
    )


@pytest.mark.parametrize("kind", KL_KINDS)
def test_gradcheck(kind: str) -> None:
    student = [x.clone().requires_grad_() for x in (HIDDEN[:3], HEAD)]
    kept = [x[:3] for x in stored(4)]
    assert torch.autograd.gradcheck(
        lambda h, w: top_k_divergence(h, w, *kept, kind=kind, beta=0.3), student
    )


@pytest.mark.parametrize("k", [4, VOCABULARY])
def test_rows_of_weight_zero_are_never_read(k: int, device_path: None) -> None:
    hidden, (scores, ids, rest) = HIDDEN.clone(), stored(k)
    hidden[ROW_WEIGHT == 0], scores[ROW_WEIGHT == 0], ids[ROW_WEIGHT == 0] = math.nan, math.inf, 0
    if rest is not None:
        rest[ROW_WEIGHT == 0] = math.nan

    def function(h: Tensor, w: Tensor, backend: str) -> Tensor:
        return top_k_divergence(
            h, w, scores, ids, rest, kind="jsd", row_weight=ROW_WEIGHT, backend=backend
        )

    for backend in ("eager", "streamed"):
        value, hidden_grad, weight_grad = results(function, backend, [hidden, HEAD])
        assert value > 0 and weight_grad.isfinite().all() and weight_grad.abs().max() > 0
        assert torch.equal(hidden_grad[ROW_WEIGHT == 0], torch.zeros(4, 4).double())


def test_the_student_equal_to_its_teacher_is_at_the_bottom() -> None:
    student = [x.clone().requires_grad_() for x in TEACHER]
    # tvd has a kink there.
    for kind in KL_KINDS[:-1]:
        value = top_k_divergence(*student, *stored(4), kind=kind, temperature=TEMPERATURE)
        found = torch.autograd.grad(value, student)
        assert abs(value.item()) < 1e-12 and max(x.abs().max() for x in found) < 1e-7, kind


def test_the_operator_is_sound() -> None:
    options = {"kind": "jsd", "beta": 0.3, "temperature": 2.0}
    options |= {"student_scale": 1.0, "student_cap": 2.0}
    check_operator(operation("top_k"), HIDDEN, HEAD, *stored(4), None, None, **options)


SCORES, IDS, REST = stored(4)
REFUSED = {
    "'cross_entropy'.*forward_kl.*tvd": {"kind": "cross_entropy"},
    "beta=0.*'jsd'": {"kind": "jsd", "beta": 0.0},
    "temperature=0": {"temperature": 0.0},
    "student_soft_cap=-1": {"student_soft_cap": -1.0},
    "11 rows and row_weight 4": {"row_weight": torch.ones(4)},
    "11 rows and teacher_scores 3": {"kept": (SCORES[:3], IDS[:3], REST[:3])},
    r"\(11, 4\) and teacher_ids \(11, 2\)": {"kept": (SCORES, IDS[:, :2], REST)},
    "10 entries.*vocabulary has 9": {"kept": (randn(11, 10), randn(11, 10).argsort(), None)},
    "rest is missing with 4 of 9": {"kept": (SCORES, IDS, None)},
    "rest is given with 9 of 9": {"kept": (*stored(9)[:2], REST)},
    "use one of: auto, streamed, eager": {"backend": "triton"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message: str) -> None:
    options = {"kind": "forward_kl", "kept": stored(4)} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        top_k_divergence(HIDDEN, HEAD, *options.pop("kept"), **options)
