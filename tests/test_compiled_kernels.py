"""The operations as torch.compile sees them: operators whose graphs do not break."""

import importlib
import itertools

import pytest
import torch
from test_streamed import HEADS, LENGTH, MASKS, OPERATIONS, randn, results, small_blocks
from torch import Tensor

from mlkd_kernels._dispatch import Operation

__all__ = ["small_blocks"]


WEIGHTS = torch.linspace(0, 1, 2 * LENGTH).view(2, LENGTH)


def operation(module: str, name: str = "OPERATION") -> Operation:
    return getattr(importlib.import_module(f"mlkd_kernels.{module}"), name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_code_is_one_graph(name: str) -> None:
    function, leaves = OPERATIONS[name]

    def caller(*x: Tensor, backend: str) -> Tensor:
        return function(*(one.sin().asin() for one in x), backend=backend) * 2.0

    leaves = [x / (4 * x.abs().max()) for x in leaves]
    expected = results(caller, "streamed", leaves)
    # What other tests compiled here counts against a limit.
    torch.compiler.reset()
    compiled = torch.compile(caller, backend="aot_eager", fullgraph=True)
    for one, other in zip(results(compiled, "streamed", leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*leaves, backend="streamed").flatten(), expected[0].flatten()
        )


def check_operator(checked: Operation, *tensors: Tensor | None, **options: object) -> None:
    """What PyTorch asks of an operator: its schema, shapes, strides and gradients under tracing."""
    leaves = [x.clone().requires_grad_() for x in tensors[: checked.leaves]]
    ordered = [options[name] for name in checked.options]
    for wanted in itertools.product([True, False], repeat=checked.leaves):
        given = [x if want else x.detach() for x, want in zip(leaves, wanted, strict=True)]
        rest = *tensors[checked.leaves :], *ordered, "streamed", list(wanted)
        torch.library.opcheck(checked.operator, (*given, *rest))


SCALES = {"student_scale": 0.3, "teacher_scale": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_sound(dtype: torch.dtype) -> None:
    student, teacher = randn(2, LENGTH, 6).to(dtype), randn(2, LENGTH, 12, seed=1).to(dtype)
    tokens = {"heads": 3, "causal": False, **SCALES}
    rows = operation("relation", "ROWS")
    check_operator(rows, student, teacher, MASKS["holes"], **tokens)
    check_operator(rows, student.mT.contiguous().mT, teacher, None, **tokens)
    weight = WEIGHTS.to(dtype)
    check_operator(operation("relation", "SUM"), student, teacher, None, weight, **tokens)
    queries = [
        x.unflatten(-1, (3, -1)).transpose(1, 2) for x in (student, student, teacher, teacher)
    ]
    for name in ("KL", "MSE"):
        maps = operation("attention_map", name)
        check_operator(maps, *queries, MASKS["left"], causal=True, **SCALES)
        sums = operation("attention_map", f"{name}_SUM")
        check_operator(sums, *queries, MASKS["left"], weight, causal=True, **SCALES)
    samples = student[0], teacher[0]
    check_operator(operation("similarity", "KL"), *samples, None, diagonal=False, **SCALES)
    check_operator(operation("similarity", "NARROW_MSE"), *samples)
    keep = torch.arange(LENGTH) != 2
    check_operator(operation("contrastive"), samples[0], samples[0] + 1, keep, None, scale=2.0)
    heads = [x.to(dtype) for x in HEADS]
    scales = {"student_scale": 1.0, "student_cap": 2.0, "teacher_scale": 1.0, "teacher_cap": None}
    options = {"kind": "jsd", "beta": 0.3, "temperature": 2.0, **scales}
    check_operator(operation("linear_divergence"), *heads, None, None, None, **options)
