"""The streamed backend against the definitions, with blocks so small that there are many."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mlkd_kernels import (
    attention_kl,
    attention_mse,
    info_nce,
    linear_divergence,
    relation_kl,
    similarity,
    similarity_kl,
    similarity_mse,
)
from mlkd_kernels.streamed import blocks, products, row_kl, tokens
from mlkd_kernels.streamed import linear_divergence as heads_in_chunks

KL_KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
# No multiple of a block's 4 rows, and more than one block.
LENGTH = 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch.setattr)


def make_blocks_small(setattr: Callable = setattr) -> None:
    setattr(blocks, "CPU_ROWS", 4)
    setattr(blocks, "MIN_CPU_ROWS", 2)
    # Two heads of 4 rows of 11 keys: a block holds less than the 6 heads.
    setattr(blocks, "CPU_SCORES", 2 * 4 * LENGTH)
    setattr(blocks, "CUDA_SCORES", 2 * 4 * LENGTH)
    setattr(blocks, "SMALL", 0)
    setattr(tokens, "MIN_PACKED_SCORES", 0)
    setattr(heads_in_chunks, "CPU_TOKENS", 4)
    setattr(heads_in_chunks, "MIN_CUDA_TOKENS", 2)
    setattr(heads_in_chunks, "CUDA_BYTES", 0)


@pytest.fixture(params=["cpu", "other", "kept"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to treat padding: that of the CPU and the one without waiting for a device; and few
    scores, whose slopes are kept."""
    if request.param == "other":
        monkeypatch.setattr(blocks, "CPU", "no device of this name")
    if request.param == "kept":
        monkeypatch.setattr(blocks, "SMALL", 2 * 6 * LENGTH**2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def masks() -> dict[str, Tensor | None]:
    lengths = torch.tensor([[4], [LENGTH]])
    right = torch.arange(LENGTH) < lengths
    holes = torch.arange(2 * LENGTH).view(2, LENGTH) % 3 != 1
    whole = torch.tensor([[False], [True]]).expand(2, LENGTH) & holes[1]
    return {"none": None, "right": right, "left": right.flip(1), "holes": holes, "whole": whole}


MASKS = masks()
# Of every row of two sequences; some do not count.
WEIGHT = torch.linspace(-0.5, 2.0, 2 * LENGTH, dtype=torch.float64).view(2, LENGTH)
WEIGHT[:, ::4] = 0.0


def results(function: Callable, backend: str, inputs: list[Tensor]) -> list[Tensor]:
    """The value and the gradients of a sum in which every row weighs differently."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves, backend=backend)
    weight = torch.linspace(-0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), leaves)]


def check_parity(function: Callable, *inputs: Tensor, rtol: float = 1e-10) -> None:
    found = results(function, "streamed", inputs)
    expected = results(function, "eager", inputs)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-6, "the comparison must not be of zeros"
        assert one.dtype == other.dtype
        atol = rtol * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def relation(
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.float64,
    weighs: bool = False,
) -> tuple[Callable, Tensor]:
    teacher = randn(2, LENGTH, 12, seed=1).to(dtype)
    options = {"heads": 3, "mask": mask, "causal": causal, "temperature": 0.7}
    options["row_weight"] = WEIGHT.to(dtype) if weighs else None
    return lambda s, **o: relation_kl(s, teacher, **options, **o), randn(2, LENGTH, 6).to(dtype)


def attention(
    mask: Tensor | None = None,
    causal: bool = False,
    key_heads: tuple[int, int] = (3, 2),
    dtype: torch.dtype = torch.float64,
    loss: Callable = attention_kl,
    weighs: bool = False,
) -> tuple[Callable, Tensor, Tensor]:
    shapes = (6, 3), (key_heads[0], 3), (6, 5), (key_heads[1], 5)
    vectors = [randn(2, h, LENGTH, d, seed=i).to(dtype) for i, (h, d) in enumerate(shapes)]
    student, teacher = vectors[:2], vectors[2:]
    options = {"mask": mask, "causal": causal, "student_scale": 0.9}
    options["row_weight"] = WEIGHT.to(dtype) if weighs else None
    return lambda q, k, **o: loss(q, k, *teacher, **options, **o), *student


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_relation_parity(name: str, causal: bool, weighs: bool, device_path: None) -> None:
    check_parity(*relation(MASKS[name], causal, weighs=weighs))


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("loss", [attention_kl, attention_mse])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_attention_parity(
    name: str, causal: bool, loss: Callable, weighs: bool, device_path: None
) -> None:
    check_parity(*attention(MASKS[name], causal, loss=loss, weighs=weighs))


@pytest.mark.parametrize("backend", ["eager", "streamed"])
@pytest.mark.parametrize("given", [relation, attention])
def test_weighted_rows_are_their_sum(given: Callable, backend: str) -> None:
    rows, *inputs = given(MASKS["holes"])
    expected = results(lambda *x, **o: (rows(*x, **o) * WEIGHT[:, None]).sum(), backend, inputs)
    found = results(given(MASKS["holes"], weighs=True)[0], backend, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"row_weight is of shape \(22,\); it must be \(2, 11\)"):
        if given is relation:
            relation_kl(*inputs, *inputs, heads=3, row_weight=WEIGHT.flatten())
        attention_kl(*inputs, *inputs, row_weight=WEIGHT.flatten())


# Key heads of student and teacher under 6 query heads; 2 and 3 make groups that do not nest.
@pytest.mark.parametrize("key_heads", [(6, 6), (2, 3), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("loss", [attention_kl, attention_mse])
def test_attention_parity_of_grouped_queries(
    key_heads: tuple[int, int], loss: Callable, device_path: None
) -> None:
    check_parity(*attention(MASKS["right"], True, key_heads, loss=loss))


@pytest.mark.parametrize("loss", [attention_kl, attention_mse])
@pytest.mark.parametrize("needed", [0, 1])
def test_a_frozen_side_of_attention_gets_no_gradient(
    needed: int, loss: Callable, device_path: None
) -> None:
    function, *inputs = attention(loss=loss)
    expected = results(function, "eager", inputs)[1 + needed]
    inputs[needed].requires_grad_()
    value = function(*inputs, backend="streamed")
    weight = torch.linspace(-0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weight).sum().backward()
    torch.testing.assert_close(inputs[needed].grad, expected, rtol=1e-10, atol=1e-12)
    assert inputs[1 - needed].grad is None


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_relation_parity_at_the_borders_of_blocks(length: int) -> None:
    student, teacher = randn(3, length, 8), randn(3, length, 4, seed=1)
    for causal in (False, True):

        def function(s: Tensor, backend: str, causal: bool = causal) -> Tensor:
            return relation_kl(s, teacher, heads=2, causal=causal, backend=backend)

        pairs = zip(*(results(function, b, [student]) for b in ("streamed", "eager")), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_relation_parity_of_one_wide_head() -> None:
    student, teacher = randn(2, LENGTH, 384) / 4, randn(2, LENGTH, 8192, seed=1) / 8
    check_parity(lambda s, **o: relation_kl(s, teacher, heads=1, **o), student)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_parity_in_other_precisions(dtype: torch.dtype, rtol: float, device_path: None) -> None:
    function, student = relation(MASKS["holes"], dtype=dtype)
    # 16 bit gradients are the same but for their last bit, values are made in fp32 of both.
    check_parity(function, student, rtol=rtol)
    found = function(student, backend="streamed")
    assert found.dtype == torch.float32
    wide, _ = relation(MASKS["holes"])
    wide = relation_kl(
        student.double(),
        randn(2, LENGTH, 12, seed=1).to(dtype).double(),
        heads=3,
        mask=MASKS["holes"],
        temperature=0.7,
        backend="eager",
    )
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-6)


def sum_in_fp32(out: Tensor, left: Tensor, right: Tensor, scale: float, keep: float) -> None:
    assert left.dtype == right.dtype
    out.copy_(scale * (left.float() @ right.float()) + (keep * out if keep else 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["relation_kl", "relation_kl_sum", "attention_kl", *KL_KINDS])
def test_sixteen_bit_factors_stay_so(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which sums their products in fp32: nothing but the gradient of the scores, just
    before its product, is rounded."""
    monkeypatch.setattr(products, "multiplies_16_bits", lambda x: x.dtype in products.SIXTEEN_BITS)
    monkeypatch.setattr(row_kl, "multiplies_16_bits", products.multiplies_16_bits)
    monkeypatch.setattr(products, "_product", sum_in_fp32)
    monkeypatch.setattr(blocks, "CPU", "no device of this name")
    if name.startswith("relation_kl"):
        function, *inputs = relation(MASKS["holes"], dtype=dtype, weighs=name.endswith("sum"))
    elif name == "attention_kl":
        function, *inputs = attention(MASKS["left"], dtype=dtype)
    else:
        heads = [x.to(dtype) for x in HEADS]
        # Small as 1 / (number of rows): what fp16 would lose without a unit.
        weight = torch.linspace(0, 1e-6, len(heads[0]))
        options = {"kind": name, "row_weight": weight}
        function = lambda h, w, **o: 1e6 * linear_divergence(h, w, *heads[2:], **options, **o)  # noqa: E731
        inputs = heads[:2]
    found = results(lambda *x, **o: function(*x, **o) * 1.0, "streamed", inputs)
    wide = [x.double() for x in inputs]
    expected = results(function, "eager", wide)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        # The gradient itself is rounded too, to the type of its leaf.
        within = 1e-5 if i == 0 else 2 * torch.finfo(dtype).eps
        assert ((one - other).norm() / other.norm()).item() < within


def test_non_contiguous_inputs() -> None:
    function, student = relation()
    strided = student.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert torch.equal(function(strided, backend="streamed"), function(student, backend="streamed"))
    function, query, key = attention()
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    found, expected = (results(function, "streamed", x) for x in (swapped, [query, key]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_padding_is_never_read(name: str, causal: bool, device_path: None) -> None:
    mask = MASKS[name]
    real = mask[:, None, :, None]
    function, *inputs = attention(mask, causal)
    expected = results(function, "streamed", inputs)
    poisoned = [
        x.where(real, poison) for x, poison in zip(inputs, (math.nan, math.inf), strict=True)
    ]
    found = results(function, "streamed", poisoned)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(found[0], found[0].where(mask[:, None], 0.0))
    function, student = relation(mask, causal)
    expected = results(function, "streamed", [student])
    found = results(function, "streamed", [student.where(mask[..., None], math.nan)])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(found[1], found[1].where(mask[..., None], 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "holes"])
def test_a_perfect_student_has_exactly_no_loss(
    name: str, dtype: torch.dtype, device_path: None
) -> None:
    mask, tokens = MASKS[name], 3 * randn(2, LENGTH, 6).to(dtype)
    heads, samples = 3 * randn(2, 6, LENGTH, 3).to(dtype), 3 * randn(LENGTH, 4).to(dtype)
    one_mask = None if mask is None else mask[0]
    for function, x in (
        (lambda s: relation_kl(s, tokens, heads=3, mask=mask), tokens),
        (lambda s: relation_kl(s, tokens, heads=3, mask=mask, causal=True), tokens),
        (lambda s: attention_kl(s, s[:, ::3], heads, heads[:, ::3], mask=mask), heads),
        (lambda s: relation_kl(s, tokens, heads=3, mask=mask, row_weight=WEIGHT), tokens),
        (lambda s: similarity_kl(s, samples, mask=one_mask), samples),
        (lambda s: similarity_mse(s, samples), samples),
    ):
        student = x.clone().requires_grad_()
        rows = function(student)
        rows.sum().backward()
        assert torch.equal(rows, torch.zeros_like(rows))
        assert torch.equal(student.grad, torch.zeros_like(x))


def test_rows_keep_their_digits_where_scores_are_large() -> None:
    """All scores of a row near 4000: without their maximum taken away fp32 has no digits left."""
    base = torch.full((1, LENGTH, 2), 40.0)
    student, teacher = (base + 0.02 * randn(1, LENGTH, 2, seed=s).float() for s in (0, 1))
    # Multiples of 1/64, so that products and sums are exact in fp32.
    student, teacher = ((64 * x).round() / 64 for x in (student, teacher))
    options = {"heads": 1, "student_scale": 1.0, "teacher_scale": 1.0}
    exact = relation_kl(student.double(), teacher.double(), backend="eager", **options)
    found = relation_kl(student, teacher, backend="streamed", **options)
    assert exact.max() > 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", [None, MASKS["holes"][0]])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_kl_parity(normalize: bool, diagonal: bool, mask: Tensor | None) -> None:
    teacher = randn(LENGTH, 5, seed=1)
    options = {"normalize": normalize, "diagonal": diagonal, "mask": mask, "temperature": 0.6}
    check_parity(lambda s, **o: similarity_kl(s, teacher, **options, **o), randn(LENGTH, 3))


def test_a_sample_without_columns_is_zero() -> None:
    mask = torch.arange(LENGTH) == 4
    student = randn(LENGTH, 3).requires_grad_()
    options = {"mask": mask, "diagonal": False}
    rows = similarity_kl(student, randn(LENGTH, 5, seed=1), backend="streamed", **options)
    rows.sum().backward()
    assert torch.equal(rows, torch.zeros_like(rows))
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_mse_by_widths_is_the_one_by_samples(normalize: bool) -> None:
    # 40 samples of widths 3 and 5: the products of the widths are the cheaper ones.
    vectors = [randn(40, 3), randn(40, 5, seed=1)]
    student, teacher = (similarity._vectors(x, normalize) for x in vectors)

    def function(s: Tensor, backend: str) -> Tensor:
        run = similarity.streamed.similarity_mse if backend == "streamed" else similarity._mse
        return run(s, teacher, None)

    assert similarity.streamed.narrow_is_cheaper(40, 3, 5)
    assert not similarity.streamed.narrow_is_cheaper(4, 3, 5)
    check_parity(function, student)


@pytest.mark.parametrize("mask", [None, MASKS["holes"][0]])
@pytest.mark.parametrize("labels", [None, torch.arange(LENGTH) % 4 - 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_parity(normalize: bool, labels: Tensor | None, mask: Tensor | None) -> None:
    teacher = randn(LENGTH, 3, seed=1)
    labels = None if labels is None else labels.where(labels >= 0, -100)
    options = {"normalize": normalize, "labels": labels, "mask": mask, "temperature": 0.7}
    check_parity(lambda s, **o: info_nce(s, teacher, **options, **o), randn(LENGTH, 3))


HEADS = randn(LENGTH, 4), randn(9, 4, seed=1), randn(LENGTH, 3, seed=2), randn(9, 3, seed=3)
ROW_WEIGHT = torch.arange(LENGTH).double() % 3
LOGITS = {
    "plain": {},
    "capped": {"student_soft_cap": 1.5, "teacher_soft_cap": 2.0},
    "scaled": {"student_logit_scale": 0.5, "teacher_logit_scale": 1.5},
    "both": {
        "student_soft_cap": 1.5,
        "teacher_soft_cap": 2.0,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 1.5,
    },
}


@pytest.mark.parametrize("row_weight", [None, ROW_WEIGHT])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("kind", [*KL_KINDS, "cross_entropy"])
def test_linear_divergence_parity(
    kind: str, logits: str, row_weight: Tensor | None, device_path: None
) -> None:
    options = {"kind": kind, "temperature": 1.3, "beta": 0.2, "row_weight": row_weight}
    teacher, more = HEADS[2:], LOGITS[logits]
    if kind == "cross_entropy":
        teacher = None, None
        options["labels"] = (torch.arange(LENGTH) % 9).where(torch.arange(LENGTH) % 4 > 0, -100)
        more = {name: value for name, value in more.items() if name.startswith("student")}
    check_parity(
        lambda h, w, **o: linear_divergence(h, w, *teacher, **options, **more, **o), *HEADS[:2]
    )


@pytest.mark.parametrize("backend", ["eager", "streamed"])
def test_soft_cap_and_scale_are_their_definition(backend: str) -> None:
    temperature, options = 1.3, LOGITS["both"]

    def log_softmax(x: Tensor, weight: Tensor, cap: float, scale: float) -> Tensor:
        return (cap * torch.tanh(scale * x @ weight.T / cap) / temperature).log_softmax(-1)

    log_q, log_p = log_softmax(*HEADS[:2], 1.5, 0.5), log_softmax(*HEADS[2:], 2.0, 1.5)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    found = linear_divergence(
        *HEADS, kind="forward_kl", temperature=temperature, backend=backend, **options
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_bad_caps_and_scales_are_refused() -> None:
    for name in LOGITS["both"]:
        with pytest.raises(ValueError, match=f"{name}=-1.0.*greater"):
            linear_divergence(*HEADS, kind="forward_kl", **{name: -1.0})


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_divergence_parity_in_other_precisions(kind: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in HEADS]
    rtol = 2e-5 if dtype == torch.float32 else 1e-2
    check_parity(
        lambda h, w, **o: linear_divergence(h, w, *inputs[2:], kind=kind, **o),
        *inputs[:2],
        rtol=rtol,
    )


@pytest.mark.parametrize("kind", [*KL_KINDS, "cross_entropy"])
def test_rows_of_weight_zero_are_never_read(kind: str, device_path: None) -> None:
    inputs = [x.clone() for x in HEADS]
    inputs[0][ROW_WEIGHT == 0], inputs[2][ROW_WEIGHT == 0] = math.nan, math.inf
    options = {"kind": kind, "row_weight": ROW_WEIGHT}
    if kind == "cross_entropy":
        options["labels"] = torch.arange(LENGTH) % 9

    def function(h: Tensor, w: Tensor, backend: str) -> Tensor:
        return linear_divergence(h, w, *inputs[2:], **options, backend=backend)

    value, hidden_grad, weight_grad = results(function, "streamed", inputs[:2])
    assert value > 0 and weight_grad.isfinite().all() and weight_grad.abs().max() > 0
    assert torch.equal(hidden_grad[ROW_WEIGHT == 0], torch.zeros(4, 4).double())


@pytest.mark.parametrize("needed", [0, 1])
def test_a_frozen_head_or_hidden_state_gets_no_gradient(
    needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    add = heads_in_chunks._add_gradients
    monkeypatch.setattr(
        heads_in_chunks, "_add_gradients", lambda *args: made.append(args[-1]) or add(*args)
    )
    inputs = [x.clone() for x in HEADS]
    expected = results(
        lambda h, w, backend: linear_divergence(h, w, *HEADS[2:], kind="jsd", backend=backend),
        "eager",
        inputs[:2],
    )[1 + needed]
    inputs[needed].requires_grad_()
    linear_divergence(*inputs, kind="jsd", backend="streamed").backward()
    # The weight of a scalar's single row in `results` is -0.5.
    torch.testing.assert_close(inputs[needed].grad, expected / -0.5, rtol=1e-10, atol=1e-12)
    assert made and all(grads[1 - needed] is None for grads in made)


@pytest.mark.parametrize("given", [relation, attention])
def test_no_gradient_is_made_where_none_is_wanted(
    given: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, *inputs = given(weighs=True)
    expected = function(*inputs, backend="eager")
    monkeypatch.setattr(row_kl, "_gradients", never)
    student = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        value = function(*student, backend="streamed")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(function(*inputs, backend="streamed"), expected)
    with pytest.raises(AssertionError, match="gradient work"):
        function(*student, backend="streamed")


def never(*args: object) -> None:
    raise AssertionError("gradient work")


def test_nothing_is_made_for_gradients_without_grad(monkeypatch: pytest.MonkeyPatch) -> None:

    expected = linear_divergence(*HEADS, kind="forward_kl", backend="eager")
    monkeypatch.setattr(heads_in_chunks, "_add_gradients", never)
    student = [x.clone().requires_grad_() for x in HEADS[:2]]
    with torch.no_grad():
        value = linear_divergence(*student, *HEADS[2:], kind="forward_kl", backend="streamed")
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad
    with pytest.raises(AssertionError, match="gradient work"):
        linear_divergence(*student, *HEADS[2:], kind="forward_kl", backend="streamed")


def every_operation() -> dict[str, tuple[Callable, list[Tensor]]]:
    samples = randn(LENGTH, 3, seed=1)
    found = {"relation_kl": relation(), "attention_kl": attention()}
    found["attention_mse"] = attention(causal=True, loss=attention_mse)
    found["relation_kl_sum"] = relation(MASKS["holes"], weighs=True)
    found["attention_kl_sum"] = attention(MASKS["left"], weighs=True)
    found["attention_mse_sum"] = attention(loss=attention_mse, weighs=True)
    found["similarity_kl"] = lambda s, **o: similarity_kl(s, samples, **o), randn(LENGTH, 3)
    found["info_nce"] = lambda s, **o: info_nce(s, samples, **o), randn(LENGTH, 3)
    found["similarity_mse"] = (lambda s, backend: similarity_mse(s, samples), randn(LENGTH, 3))
    for kind in KL_KINDS:
        found[kind] = (
            lambda h, w, k=kind, **o: linear_divergence(h, w, *HEADS[2:], kind=k, **o),
            *HEADS[:2],
        )
    return {name: (function, list(inputs)) for name, (function, *inputs) in found.items()}


OPERATIONS = every_operation()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_backward_finds_the_same(name: str, device_path: None) -> None:
    function, inputs = OPERATIONS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves, backend="streamed").sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    scaled = torch.autograd.grad(value, leaves, grad_outputs=-2 * torch.ones_like(value))
    for one, two, three in zip(first, second, scaled, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, two)
        torch.testing.assert_close(three, -2 * one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_and_upstream_gradients_are_left_alone(name: str) -> None:
    function, inputs = OPERATIONS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves, backend="streamed")
    upstream = torch.full_like(value, 0.3)
    torch.autograd.grad(value, leaves, grad_outputs=upstream)
    assert torch.equal(upstream, torch.full_like(value, 0.3))
    assert all(torch.equal(leaf, x) for leaf, x in zip(leaves, inputs, strict=True))


def test_small_blocks_are_really_many() -> None:
    """Otherwise no other test here would see a border."""
    found = list(blocks.blocks(torch.zeros(1), 6, 1, LENGTH, LENGTH, causal=True))
    assert len({(b.heads.start, b.rows.start) for b in found}) == 9
    assert [b.columns for b in found[:3]] == [4, 8, 11]
    assert len(list(heads_in_chunks._chunks(torch.zeros(LENGTH, 1), 9, torch.float32))) == 3


@pytest.mark.parametrize(
    "given",
    [
        relation,
        lambda mask: attention(mask, loss=attention_mse),
        lambda mask: relation(mask, weighs=True),
    ],
)
def test_memory_does_not_grow_with_the_square_of_the_length(given: Callable) -> None:
    """No tensor that lives between forward and backward is larger than the inputs."""
    function, *students = given(MASKS["holes"])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(*(x.requires_grad_() for x in students), backend="streamed")
    # The widest are the teacher's queries: 2 sequences, 6 heads of 5.
    assert kept and max(x.numel() for x in kept) <= 2 * LENGTH * 6 * 5


GROUPED = {
    "similarity_mse": similarity_mse,
    "similarity_mse plain": lambda s, t, group, **_: similarity_mse(
        s, t, normalize=False, group=group
    ),
    "similarity_kl": lambda s, t, group: similarity_kl(s, t, group=group, backend="streamed"),
    "similarity_kl options": lambda s, t, group, mask, labels: similarity_kl(
        s, t, mask=mask, diagonal=False, normalize=False, group=group, backend="streamed"
    ),
    "info_nce": lambda s, t, group: info_nce(s, t, group=group, backend="streamed"),
    "info_nce options": lambda s, t, group, mask, labels: info_nce(
        s, t, labels=labels, mask=mask, group=group, backend="streamed"
    ),
}
SAMPLES = 14


def grouped(name: str, part: slice, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Rows of the samples in `part`, and their gradient, each row weighing differently."""
    # Wider than a rank's samples are many, narrower than all are: mse must decide by all.
    student, teacher = (randn(SAMPLES, 3, seed=seed)[part] for seed in (0, 1))
    student.requires_grad_()
    options = {}
    if "options" in name:
        options["labels"] = (torch.arange(SAMPLES) % 5).where(torch.arange(SAMPLES) % 4 > 0, -100)
        options["mask"] = torch.arange(SAMPLES) % 5 != 2
        options = {key: value[part] for key, value in options.items()}
    rows = GROUPED[name](student, teacher, group=group, **options)
    weight = torch.linspace(0.5, 2.0, SAMPLES).double()[part] if rows.ndim else 1.0
    (rows * weight).sum().backward()
    return rows.detach(), student.grad


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    make_blocks_small()
    init = {"init_method": f"file://{folder}/init", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **init)
    half = SAMPLES // 2
    part = slice(half * rank, half * (rank + 1))
    torch.save(
        {name: grouped(name, part, dist.group.WORLD) for name in GROUPED}, f"{folder}/{rank}"
    )
    dist.destroy_process_group()


def test_a_group_sees_the_whole_batch(tmp_path: Path) -> None:
    assert similarity.streamed.narrow_is_cheaper(SAMPLES, 3, 3)
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    for name in GROUPED:
        rows, grad = grouped(name, slice(0, SAMPLES), None)
        for rank, found in enumerate(ranks):
            half = SAMPLES // 2
            expected = rows[half * rank : half * (rank + 1)] if rows.ndim else rows
            torch.testing.assert_close(found[name][0], expected, rtol=1e-12, atol=1e-14)
        together = torch.cat([found[name][1] for found in ranks])
        torch.testing.assert_close(together, grad, rtol=1e-10, atol=1e-13)
