"""The loss module by module: against its formula, and what it promises of padding, types and the
teacher."""

import math
from collections.abc import Callable

import pytest
import torch
from test_losses import MASK, B, L, randn, same
from torch import Tensor, nn

from mlkd_dist.losses.module_mse import module_mse
from mlkd_dist.trace import Layer, Matrix

# Widths differ from role to role, so that a mean over the wrong one shows.
INPUTS = {"query": 4, "output": 3, "down": 6}
OUTPUTS = {"query": 3, "output": 4, "down": 4}


def side(seed: int, weights: dict[str, nn.Linear] | None = None) -> Layer:
    layer = Layer(MASK, 1)
    for i, role in enumerate(INPUTS):
        layer.matrices[role] = Matrix(
            randn(B, L, INPUTS[role], seed=seed + i),
            randn(B, L, OUTPUTS[role], seed=seed + 10 + i),
            None if weights is None else weights[role],
        )
    return layer


@pytest.fixture
def weights() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {role: nn.Linear(INPUTS[role], OUTPUTS[role]).double() for role in INPUTS}


def definition(made: Callable[[str, int, int], Tensor], teacher: Layer, of: list[str]) -> Tensor:
    rows = torch.zeros(B, L, dtype=torch.float64)
    for b, i in MASK.nonzero().tolist():
        for role in of:
            for w in range(OUTPUTS[role]):
                gap = made(role, b, i)[w] - teacher.matrices[role].output[b, i, w]
                rows[b, i] += gap**2 / OUTPUTS[role]
    return rows


@pytest.mark.parametrize("of", [None, ["query"], ["down", "output"]])
def test_it_is_its_definition(of: list[str] | None, weights: dict) -> None:
    student, teacher = side(0, weights), side(100)
    named = of or list(INPUTS)
    own = definition(lambda role, b, i: student.matrices[role].output[b, i], teacher, named)
    same(module_mse(student, teacher, of=of), own)

    def applied(role: str, b: int, i: int) -> Tensor:
        x = teacher.matrices[role].input[b, i]
        return weights[role].weight @ x + weights[role].bias

    local = definition(applied, teacher, named)
    same(module_mse(student, teacher, of=of, input="teacher"), local)
    assert not torch.allclose(own, local)


@pytest.mark.parametrize("input", ["own", "teacher"])
def test_no_loss_where_the_matrices_are_the_teachers(input: str, weights: dict) -> None:
    student, teacher = side(0, weights), side(0)
    for role, matrix in teacher.matrices.items():
        matrix.output = weights[role](matrix.input)
        student.matrices[role].output = matrix.output.clone()
    rows = module_mse(student, teacher, input=input)
    assert torch.equal(rows, torch.zeros(B, L).double())


def gradients(student: Layer, teacher: Layer, weights: dict, input: str) -> tuple[Tensor, list]:
    leaves = [p for linear in weights.values() for p in linear.parameters()]
    leaves += [matrix.output.requires_grad_() for matrix in student.matrices.values()]
    rows = module_mse(student, teacher, input=input)
    found = torch.autograd.grad(rows.sum(), leaves, allow_unused=True)
    return rows.detach(), [grad for grad in found if grad is not None]


@pytest.mark.parametrize("input", ["own", "teacher"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_is_never_read(input: str, poison: float, weights: dict) -> None:
    expected, clean = gradients(side(0, weights), side(100), weights, input)
    student, teacher = side(0, weights), side(100)
    for layer in (student, teacher):
        for matrix in layer.matrices.values():
            matrix.input[~MASK], matrix.output[~MASK] = poison, poison
    rows, found = gradients(student, teacher, weights, input)
    assert torch.equal(rows, expected) and len(found) == (3 if input == "own" else 6)
    for ours, theirs in zip(found, clean, strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("input", ["own", "teacher"])
def test_a_rank_without_real_rows_returns_zeros_of_the_graph(input: str, weights: dict) -> None:
    student, teacher = side(0, weights), side(100)
    student.mask = teacher.mask = torch.zeros_like(MASK)
    rows, found = gradients(student, teacher, weights, input)
    assert torch.equal(rows, torch.zeros_like(rows))
    assert found and not any(grad.any() for grad in found)


@pytest.mark.parametrize("input", ["own", "teacher"])
def test_gradients_stay_out_of_the_teacher(input: str, weights: dict) -> None:
    student, teacher = side(0, weights), side(100)
    theirs = [
        tensor.requires_grad_() for m in teacher.matrices.values() for tensor in (m.input, m.output)
    ]
    for matrix in student.matrices.values():
        matrix.output.requires_grad_()
    module_mse(student, teacher, input=input).sum().backward()
    assert all(tensor.grad is None for tensor in theirs)


@pytest.mark.parametrize("input", ["own", "teacher"])
def test_rows_are_fp32_for_half_precision(input: str, weights: dict) -> None:
    student, teacher = side(0, weights), side(100)
    for layer in (student, teacher):
        for matrix in layer.matrices.values():
            matrix.input, matrix.output = matrix.input.bfloat16(), matrix.output.bfloat16()
    for linear in weights.values():
        linear.bfloat16()
    assert module_mse(student, teacher, input=input).dtype == torch.float32


def test_widths_that_differ_are_refused() -> None:
    student, teacher = side(0), side(100)
    student.matrices["output"].output = student.matrices["output"].output[..., :3]
    with pytest.raises(ValueError, match=r"output: .*\(5, 4, 3\).*\(5, 4, 4\).*as wide as"):
        module_mse(student, teacher)
