"""The Triton kernels beside the eager definitions in float64, in Triton's interpreter on the CPU.

Not bf16, whose products the interpreter gets wrong, and no races, registers or shared memory.
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import FP16, FP32, LONG, check_parity, padding, randn, run
from torch import Tensor

import mlkd_kernels

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton here")

BACKENDS = ("eager", "streamed", "triton")


def relation(
    student: Tensor, teacher: Tensor, keep: Tensor | None, scale: float = 1.0, **options: Any
) -> tuple[Callable, Callable]:
    """The kernel and the definition as functions of the student."""
    from mlkd_kernels.triton.relation import relation_kl

    heads = options["heads"]
    options |= {
        "student_scale": scale * (student.shape[-1] // heads) ** -0.5,
        "teacher_scale": scale * (teacher.shape[-1] // heads) ** -0.5,
    }
    wide = teacher.double()
    return (
        lambda x: relation_kl(x, teacher, keep, **options),
        lambda x: mlkd_kernels.relation_kl(x, wide, mask=keep, backend="eager", **options),
    )


def attention(
    teacher: tuple[Tensor, Tensor], keep: Tensor | None, width: int, causal: bool
) -> tuple[Callable, Callable]:
    """The kernel and the definition as functions of the student's queries and keys."""
    from mlkd_kernels.triton.attention_map import attention_kl

    options = {
        "causal": causal,
        "student_scale": width**-0.5,
        "teacher_scale": teacher[0].shape[-1] ** -0.5,
    }
    wide = [x.double() for x in teacher]
    return (
        lambda q, k: attention_kl(q, k, *teacher, keep, **options),
        lambda q, k: mlkd_kernels.attention_kl(q, k, *wide, mask=keep, backend="eager", **options),
    )


def check_relation(
    dtype: torch.dtype,
    length: int,
    heads: int,
    widths: tuple[int, int],
    causal: bool,
    kind: str,
    batch: int = 2,
) -> None:
    student, teacher = (
        randn(batch, length, heads * width, seed=seed).to(dtype)
        for seed, width in enumerate(widths)
    )
    keep = padding(kind, batch, length)
    # At half the usual scale no softmax is so sharp that the gradient is the rounding of 1 - 1.
    check_parity(relation(student, teacher, keep, scale=0.5, heads=heads, causal=causal), [student])


def check_attention(
    dtype: torch.dtype,
    length: int,
    heads: tuple[int, int, int],
    widths: tuple[int, int],
    causal: bool,
    kind: str,
) -> None:
    batch = 1 if length == LONG else 2
    student_heads, teacher_heads = heads[:2], (heads[0], heads[2])
    # Heads as a view of the projection's output, as models make them.
    student, teacher = (
        [
            randn(batch, length, count, width, seed=10 * width + i).to(dtype).transpose(1, 2)
            for i, count in enumerate(counts)
        ]
        for counts, width in zip((student_heads, teacher_heads), widths, strict=True)
    )
    keep = padding(kind, batch, length)
    check_parity(attention(tuple(teacher), keep, widths[0], causal), student)


# Each length, width of student and teacher, number of heads, kind of padding and type at least
# once, and each kind of padding with and without causal over several blocks.
RELATIONS = [
    (FP32, 1, 3, (16, 16), False, "none"),
    (FP32, 2, 1, (8, 21), True, "none"),
    (FP32, 15, 12, (21, 16), False, "right", 1),
    (FP32, 16, 3, (24, 32), True, "left"),
    (FP32, 17, 3, (40, 24), False, "holes"),
    (FP32, 63, 1, (80, 96), True, "whole"),
    (FP32, 64, 1, (96, 40), False, "none"),
    (FP32, 65, 1, (64, 128), True, "holes"),
    (FP32, 100, 1, (160, 192), False, "right"),
    (FP32, 129, 1, (128, 64), True, "right"),
    (FP16, 65, 1, (256, 256), False, "right"),
    (FP16, 65, 1, (192, 160), True, "none"),
    (FP16, 100, 3, (21, 40), False, "holes"),
    *(
        (FP16 if causal else FP32, LONG, 1, (16, 32), causal, kind)
        for kind in ("none", "right", "left", "holes", "whole")
        for causal in (False, True)
    ),
]


@pytest.mark.parametrize("case", RELATIONS, ids=str)
def test_relation_kl_is_the_definition(interpreted: Callable, case: tuple) -> None:
    interpreted(check_relation, *case)


ATTENTIONS = [
    (FP32, 1, (2, 1, 2), (16, 16), True, "none"),
    (FP32, 17, (6, 3, 2), (21, 24), False, "holes"),
    (FP32, 64, (2, 2, 2), (40, 96), True, "none"),
    (FP16, 65, (4, 1, 2), (80, 64), False, "whole"),
    (FP16, 65, (1, 1, 1), (256, 160), True, "right"),
    *(
        (FP32 if causal else FP16, LONG, (2, 2 - causal, 1 + causal), (32, 16), causal, kind)
        for kind in ("none", "left", "holes")
        for causal in (False, True)
    ),
]


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_kl_is_the_definition(interpreted: Callable, case: tuple) -> None:
    interpreted(check_attention, *case)


WIDTHS = (16, 21, 24, 32, 40, 64, 80, 96, 128)
KINDS = ("none", "right", "left", "holes", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_the_whole_grid(interpreted: Callable, causal: bool) -> None:
    lengths = (1, 2, 15, 16, 17, 63, 64, 65, 100, 129)
    relations, attentions = [], []
    for i, (length, kind) in enumerate(itertools.product(lengths, KINDS)):
        widths = WIDTHS[i % 9], WIDTHS[(i * 5 + 3) % 9]
        # Each length and kind of padding in both types: in the one causal, in the other not.
        dtype = (FP32, FP16)[(i + causal) % 2]
        # Twelve heads where they cost the interpreter least, and a second sequence where the first
        # is all padding.
        heads, batch = (12 if length < 17 else 1 + i % 3), (2 if kind == "whole" else 1)
        relations.append((dtype, length, heads, widths, causal, kind, batch))
        groups = ((4, 4, 4), (4, 2, 1), (4, 1, 2))[i % 3]
        attentions.append((dtype, length, groups, widths, causal, kind))
    interpreted.each(check_relation, relations)
    interpreted.each(check_attention, attentions)


def check_identical(dtype: torch.dtype, causal: bool, kind: str) -> None:
    x = randn(1, LONG, 24).to(dtype)
    keep = padding(kind, 1, LONG)
    rows, grad = run(relation(x, x.clone(), keep, heads=1, causal=causal)[0], [x])
    assert rows.eq(0).all() and grad.eq(0).all()
    heads = [randn(1, 1, LONG, 24, seed=i).to(dtype) for i in range(2)]
    kernel, _ = attention((heads[0].clone(), heads[1].clone()), keep, 24, causal)
    for zero in run(kernel, heads):
        assert zero.eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_identical_models_are_exactly_zero(
    interpreted: Callable, dtype: torch.dtype, causal: bool
) -> None:
    interpreted(check_identical, dtype, causal, "left" if causal else "none")


def check_poison(causal: bool, kind: str, value: float) -> None:
    keep = padding(kind, 1, LONG)
    tensors = [randn(1, LONG, width, seed=width) for width in (16, 24)]
    weight = randn(1, 1, LONG, seed=5)
    results = []
    for filler in (0.0, value):
        student, teacher = (x.where(keep[..., None], filler) for x in tensors)
        upstream = weight.where(keep[:, None], filler)
        kernel, _ = relation(student, teacher, keep, heads=1, causal=causal)
        heads = [x.unflatten(-1, (1, -1)).transpose(1, 2) for x in (student, teacher)]
        maps, _ = attention((heads[1], heads[1]), keep, 16, causal)
        results.append(
            [*run(kernel, [student], upstream), *run(maps, [heads[0], heads[0]], upstream)]
        )
    for clean, poisoned_one in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned_one)


@pytest.mark.parametrize("kind, value", [("left", float("nan")), ("holes", float("inf"))])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_in_padding_is_read(
    interpreted: Callable, kind: str, causal: bool, value: float
) -> None:
    interpreted(check_poison, causal, kind, value)


def check_sharp(spread: float, factor: float) -> None:
    """Rows of lengths from near 0 to sqrt(spread): the lse spread over as many nats."""
    sizes = torch.linspace(0.01, spread, 65).sqrt()[:, None]
    student, teacher = (
        torch.nn.functional.normalize(randn(1, 65, 16, seed=seed), dim=-1) * sizes * 4**0.5
        for seed in (0, 1)
    )
    pair = relation(student, teacher, None, heads=1, causal=False)
    # Scores of this size have lost as many digits in every fp32 computation.
    check_parity(pair, [student], rows_within=factor * spread, gradient_within=factor * spread)


@pytest.mark.parametrize("spread", [80, 300, 800])
def test_rows_of_very_different_lse(interpreted: Callable, spread: float) -> None:
    interpreted(check_sharp, spread, 1e-6)


def check_few_dimensions(spread: float, widths: tuple[int, int]) -> None:
    """As trained tokens are. The models then spread their lse over different rows."""
    # Of scores whose deviation is `spread`.
    student, teacher = (
        randn(1, 40, 4, seed=seed)
        @ randn(4, width, seed=seed + 2)
        * (spread * (4 * width) ** -0.5) ** 0.5
        for seed, width in enumerate(widths)
    )
    pair = relation(student, teacher, None, heads=1, causal=False)
    check_parity(pair, [student])


@pytest.mark.parametrize("spread, widths", [(3, (16, 16)), (10, (32, 64))])
def test_vectors_of_few_dimensions(
    interpreted: Callable, spread: float, widths: tuple[int, int]
) -> None:
    interpreted(check_few_dimensions, spread, widths)


def check_negative_scale() -> None:
    student, teacher = randn(1, 65, 16), 3 * randn(1, 65, 16, seed=1)
    check_parity(relation(student, teacher, None, -1.0, heads=1, causal=False), [student])


def test_negative_scale(interpreted: Callable) -> None:
    """Then the diagonal of a Gram matrix is its smallest part, not its largest."""
    interpreted(check_negative_scale)


def check_small_upstream() -> None:
    student = (0.01 * randn(1, 129, 32)).to(FP16)
    teacher = randn(1, 129, 32, seed=1).to(FP16)
    weight = 1e-4 * randn(1, 1, 129, seed=2)
    from mlkd_kernels.triton.relation import relation_kl

    options = {"heads": 1, "causal": False, "student_scale": 2e3, "teacher_scale": 0.1}
    pair = (
        lambda x: relation_kl(x, teacher, None, **options),
        lambda x: mlkd_kernels.relation_kl(x, teacher.double(), backend="eager", **options),
    )
    check_parity(pair, [student], weight=weight)
    rows, grad = run(pair[0], [student], torch.zeros_like(weight))
    assert rows.ne(0).all() and grad.eq(0).all()


def test_small_upstream_gradient_does_not_vanish_in_fp16(interpreted: Callable) -> None:
    interpreted(check_small_upstream)


def check_views() -> None:
    from mlkd_kernels.triton._launch import rowwise

    wide, teacher = randn(2, 30, 100), randn(2, 30, 48, seed=1)
    view = wide[:, :, 7 : 7 + 48]
    assert rowwise(view) is view, "a view with a dense last dimension is read in place"
    kernel, _ = relation(view, teacher, None, heads=2, causal=False)
    expected = run(kernel, [view.clone(memory_format=torch.contiguous_format)])
    tokens_first = view.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = view.mT.contiguous().mT
    repeated = view[:1].expand(2, -1, -1)
    for other in (view, tokens_first, columns_first):
        for one, two in zip(run(kernel, [other]), expected, strict=True):
            assert torch.equal(one, two)
    for one, two in zip(run(kernel, [repeated]), run(kernel, [repeated.clone()]), strict=True):
        assert torch.equal(one, two)
    heads = [x.unflatten(-1, (2, 24)).transpose(1, 2) for x in (view, view.flip(1))]
    maps, _ = attention((teacher.view(2, 30, 2, 24).transpose(1, 2),) * 2, None, 24, True)
    expected = run(maps, [x.contiguous() for x in heads])
    for one, two in zip(run(maps, heads), expected, strict=True):
        assert torch.equal(one, two)


def test_views_are_read_in_place(interpreted: Callable) -> None:
    interpreted(check_views)


def check_twice() -> None:
    student, teacher = randn(2, 33, 32).requires_grad_(), randn(2, 33, 32, seed=1)
    kernel, _ = relation(student, teacher, padding("holes", 2, 33), heads=2, causal=False)
    rows = kernel(student)
    once, twice = (torch.autograd.grad(rows.sum(), student, retain_graph=True) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    double = torch.autograd.grad(rows.sum() * -2, student)
    assert torch.equal(-2 * once[0], double[0])
    assert torch.equal(rows, kernel(student))
    with torch.no_grad():
        assert torch.equal(rows, kernel(student))


def test_backward_twice_and_again(interpreted: Callable) -> None:
    interpreted(check_twice)


def check_empty() -> None:
    for batch, length in ((0, 5), (2, 0)):
        x = torch.zeros(batch, length, 32)
        kernel, _ = relation(x, x, None, heads=2, causal=False)
        rows, grad = run(lambda x, kernel=kernel: kernel(x), [x], torch.zeros(batch, 2, length))
        assert rows.shape == (batch, 2, length) and grad.shape == x.shape
        x = torch.zeros(batch, 2, length, 16)
        maps, _ = attention((x, x), None, 16, False)
        rows, *grads = run(maps, [x, x], torch.zeros(batch, 2, length))
        assert rows.shape == (batch, 2, length) and all(g.shape == x.shape for g in grads)


def test_empty_batch(interpreted: Callable) -> None:
    interpreted(check_empty)


def check_mixed() -> None:
    student, teacher = randn(2, 20, 32), randn(2, 20, 48, seed=1).to(FP16)
    check_parity(relation(student, teacher, None, 0.5, heads=2, causal=False), [student])
    queries = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (student, teacher)]
    maps, _ = attention((queries[1], queries[1]), None, 16, False)
    _, both, _ = run(maps, [queries[0], queries[0]])
    fixed = queries[0].detach()
    _, alone = run(lambda q: maps(q, fixed), [queries[0]])
    assert torch.equal(both, alone)


def test_two_types_and_a_gradient_of_one_side(interpreted: Callable) -> None:
    interpreted(check_mixed)


def check_refused() -> None:
    x = randn(1, 4, 48)
    public = {name: mlkd_kernels.relation_kl(x, x + 1, heads=3, backend=name) for name in BACKENDS}
    for name in BACKENDS[1:]:
        torch.testing.assert_close(public[name], public["eager"])
    wide = randn(1, 4, 257)
    with pytest.raises(ValueError, match="triton: its heads have a width of 256 at most"):
        mlkd_kernels.attention_kl(*[wide[None]] * 4, backend="triton")
    with pytest.raises(ValueError, match="triton: it takes fp32, fp16 and bf16"):
        mlkd_kernels.info_nce(x[0].double(), x[0].double(), backend="triton")
    # By name only: the interpreter is for tests.
    assert mlkd_kernels.choose("triton") == "triton" and mlkd_kernels.choose("auto") == "streamed"
    for x in (randn(1, 4, 257), randn(1, 4, 16).double()):
        kernel, _ = relation(x, x, None, heads=1, causal=False)
        with pytest.raises(NotImplementedError, match="streamed"):
            kernel(x)


def test_what_is_not_supported_says_so(interpreted: Callable) -> None:
    interpreted(check_refused)


def check_tuned(folder: str) -> None:
    from mlkd_kernels.triton import _tiles

    _tiles.TUNED = Path(folder)
    table = {name: dict(sizes) for name, sizes in _tiles.TILES.items()}
    table["forward"][2] = [(64, _tiles.Tile(16, 16, 1, 1)), (512, _tiles.Tile(32, 16, 2, 1))]
    _tiles.write(table, _tiles.tuned_path("NVIDIA  Some GPU (80GB)"))
    assert _tiles.tuned("nvidia some-gpu 80GB") == table
    assert _tiles.tuned("another") is None
    assert _tiles.tiles_of(None) is _tiles.TILES


def test_a_device_has_tiles_of_its_own(interpreted: Callable, tmp_path: Path) -> None:
    interpreted(check_tuned, str(tmp_path))
