"""Each loss against its formula, its promises about padding, and the shape that config.py reads."""

import ast
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlkd_dist import losses, trace
from mlkd_dist.models.roles import ROLES
from mlkd_dist.rules import schema
from mlkd_dist.trace import Layer, Samples, Trace

NAMES = [
    "attention_kl",
    "attention_mse",
    "attention_relation",
    "cls_cosine",
    "embedding_mse",
    "embedding_relation",
    "hard_labels",
    "hidden_mse",
    "sample_contrast",
    "sample_relation",
    "soft_labels",
]

# Its sides are matrices rather than tensors: see test_module_mse.py.
ALL_NAMES = sorted([*NAMES, "module_mse"])

# One full sequence, one padded right, one left, one with a hole, one that is nothing but padding.
MASK = torch.tensor(
    [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool
)
B, L = MASK.shape
# The teacher is wider, and 3 heads of 2 and 4 divide both widths.
HEADS, STUDENT_WIDTH, TEACHER_WIDTH = 3, 6, 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(width: int, seed: int, heads: int = HEADS) -> Layer:
    reads = {
        name: randn(*((B,) if name in trace.VECTOR_READS else (B, L)), width, seed=seed + i)
        for i, name in enumerate(trace.LAYER_READS)
    }
    return Layer(MASK, heads, **reads)


def model(width: int, seed: int, logits: tuple = (B, 5)) -> Trace:
    labels = torch.arange(math.prod(logits[:-1])).view(logits[:-1]) % logits[-1]
    return Trace(
        MASK,
        HEADS,
        embedding=randn(B, L, width, seed=seed),
        logits=randn(*logits, seed=seed + 1),
        labels=labels,
    )


def samples(width: int, seed: int, labels: list | None = None) -> Samples:
    keep = torch.tensor([True, True, False, True, True])
    return Samples(
        randn(B, width, seed=seed), keep, None if labels is None else torch.tensor(labels)
    )


def probabilities(scores: list[Tensor]) -> list[Tensor]:
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), torch.zeros(()).double())


def relation(student: Tensor, teacher: Tensor, keep: Tensor, scales: tuple, i: int) -> Tensor:
    """KL of row i of softmax(scale x x^t) over the kept rows of x."""
    keys = keep.nonzero()[:, 0].tolist() if keep[i] else []
    q, p = (
        probabilities([scale * (x[i] @ x[j]) for j in keys])
        for x, scale in zip((student, teacher), scales, strict=True)
    )
    return kl(p, q)


def same(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-6, "the comparison must not be of zeros"
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_embedding_relation_is_its_definition() -> None:
    student, teacher = model(STUDENT_WIDTH, 0), model(TEACHER_WIDTH, 10)
    for options, scales in (
        ({}, (6**-0.5, 12**-0.5)),
        ({"temperature": 2.0}, (6**-0.5 / 2, 12**-0.5 / 2)),
        ({"student_scale": 0.2, "teacher_scale": 0.1}, (0.2, 0.1)),
    ):
        expected = [
            relation(student.embedding[b], teacher.embedding[b], MASK[b], scales, i)
            for b in range(B)
            for i in range(L)
        ]
        rows = losses.load("embedding_relation")(student, teacher, **options)
        same(rows, torch.stack(expected).view(B, L))


def attention_definition(
    student: Layer, teacher: Layer, of: list[str], splits: int, causal: bool
) -> Tensor:
    rows = torch.zeros(B, splits, L, dtype=torch.float64)
    for name in of:
        blocks = [getattr(x, name).chunk(splits, -1) for x in (student, teacher)]
        for b in range(B):
            for r in range(splits):
                x, y = (block[r][b] for block in blocks)
                scales = (x.shape[-1] ** -0.5, y.shape[-1] ** -0.5)
                for i in range(L):
                    seen = MASK[b] & (torch.arange(L) <= i) if causal else MASK[b]
                    rows[b, r, i] += relation(x, y, seen, scales, i)
    return rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "of", [["context"], ["attention_output"], ["query", "key", "value"], ["value"]]
)
def test_attention_relation_is_its_definition(of: list[str], causal: bool) -> None:
    # The teacher's own head number must not matter.
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10, heads=4)
    for splits in (None, 2):
        rows = losses.load("attention_relation")(
            student, teacher, of=of, splits=splits, causal=causal
        )
        same(rows, attention_definition(student, teacher, of, splits or HEADS, causal))


def test_attention_relation_reads_context_by_default() -> None:
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10)
    same(
        losses.load("attention_relation")(student, teacher),
        attention_definition(student, teacher, ["context"], HEADS, False),
    )


def test_attention_relation_looks_back_where_the_student_does() -> None:
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10)
    student.causal = True
    expected = attention_definition(student, teacher, ["context"], HEADS, True)
    same(losses.load("attention_relation")(student, teacher), expected)
    both_ways = losses.load("attention_relation")(student, teacher, causal=False)
    same(both_ways, attention_definition(student, teacher, ["context"], HEADS, False))


def test_hidden_mse_is_its_definition() -> None:
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10)
    projection = torch.nn.Linear(STUDENT_WIDTH, TEACHER_WIDTH, dtype=torch.float64)
    expected = torch.zeros(B, L, dtype=torch.float64)
    for b, i in MASK.nonzero().tolist():
        for d in range(TEACHER_WIDTH):
            projected = projection.weight[d] @ student.hidden[b, i] + projection.bias[d]
            expected[b, i] += (projected - teacher.hidden[b, i, d]) ** 2 / TEACHER_WIDTH
    same(losses.load("hidden_mse")(student, teacher, projection), expected)


def test_embedding_mse_is_its_definition() -> None:
    student, teacher = model(STUDENT_WIDTH, 0), model(TEACHER_WIDTH, 10)
    projection = torch.nn.Linear(STUDENT_WIDTH, TEACHER_WIDTH, dtype=torch.float64)
    expected = torch.zeros(B, L, dtype=torch.float64)
    for b, i in MASK.nonzero().tolist():
        gap = projection.weight @ student.embedding[b, i] + projection.bias
        gap = gap - teacher.embedding[b, i]
        expected[b, i] = sum(x**2 for x in gap) / TEACHER_WIDTH
    same(losses.load("embedding_mse")(student, teacher, projection), expected)


def grouped(width: int, seed: int, key_heads: int, scale: float | None, causal: bool) -> Layer:
    """Of 4 heads of `width`, with fewer keys."""
    query, key = randn(B, L, 4 * width, seed=seed), randn(B, L, key_heads * width, seed=seed + 1)
    return Layer(MASK, 4, query=query, key=key, scale=scale, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_losses_are_their_definitions(causal: bool) -> None:
    """Heads of two widths, keys for pairs of heads in the student and for all in the teacher."""
    student, teacher = grouped(3, 0, 2, 0.7, causal), grouped(5, 10, 1, None, causal)
    divergence, squares = (torch.zeros(B, 4, L, dtype=torch.float64) for _ in range(2))
    for b, i in MASK.nonzero().tolist():
        keys = [j for j in MASK[b].nonzero()[:, 0].tolist() if not causal or j <= i]
        for h in range(4):
            ours, theirs = slice(3 * h, 3 * h + 3), slice(5 * h, 5 * h + 5)
            of_pair = slice(3 * (h // 2), 3 * (h // 2) + 3)
            q = [0.7 * student.query[b, i, ours] @ student.key[b, j, of_pair] for j in keys]
            p = [5**-0.5 * teacher.query[b, i, theirs] @ teacher.key[b, j] for j in keys]
            divergence[b, h, i] = kl(probabilities(p), probabilities(q))
            squares[b, h, i] = sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) / len(keys)
    for backend in ("eager", "streamed"):
        same(losses.load("attention_kl")(student, teacher, backend=backend), divergence)
        same(losses.load("attention_mse")(student, teacher, backend=backend), squares)


@pytest.mark.parametrize("of", trace.VECTOR_READS)
def test_cls_cosine_is_its_definition(of: str) -> None:
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10)
    projection = torch.nn.Linear(STUDENT_WIDTH, TEACHER_WIDTH, bias=False, dtype=torch.float64)
    expected = torch.zeros(B, dtype=torch.float64)
    # The last sample has no token.
    for b in range(B - 1):
        x, y = projection.weight @ getattr(student, of)[b], getattr(teacher, of)[b]
        expected[b] = 1 - x @ y / ((x @ x).sqrt() * (y @ y).sqrt())
    same(losses.load("cls_cosine")(student, teacher, projection, of=of), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("diagonal", [True, False])
def test_sample_relation_is_its_definition(normalize: bool, diagonal: bool) -> None:
    student, teacher, temperature = samples(STUDENT_WIDTH, 0), samples(TEACHER_WIDTH, 10), 1.5
    vectors, scales = [], []
    for side in (student, teacher):
        lengths = side.vector.square().sum(-1, keepdim=True).sqrt()
        vectors.append(side.vector / lengths if normalize else side.vector)
        width = 1 if normalize else side.vector.shape[1]
        scales.append(width**-0.5 / temperature)
    expected = []
    for i in range(B):
        columns = [j for j in range(B) if student.keep[j] and (diagonal or j != i)]
        q, p = (
            probabilities([scale * (x[i] @ x[j]) for j in columns])
            for x, scale in zip(vectors, scales, strict=True)
        )
        expected.append(kl(p, q) * student.keep[i])
    rows = losses.load("sample_relation")(
        student, teacher, temperature=temperature, normalize=normalize, diagonal=diagonal
    )
    same(rows, torch.stack(expected))


LABELS = [4, 4, 4, -100, 2]


@pytest.mark.parametrize(
    "positives, given, used",
    [
        ("auto", LABELS, LABELS),
        ("label", LABELS, LABELS),
        ("sample", LABELS, None),
        ("auto", None, None),
    ],
)
def test_sample_contrast_is_its_definition(positives: str, given: list, used: list) -> None:
    student, teacher = samples(STUDENT_WIDTH, 0, given), samples(STUDENT_WIDTH, 10, given)
    z = [v / (v @ v).sqrt() for v in (*student.vector, *teacher.vector)]
    expected = torch.zeros(B, dtype=torch.float64)
    for i in range(2 * B):
        if not student.keep[i % B]:
            continue
        others = [a for a in range(2 * B) if a != i and student.keep[a % B]]
        partners = [
            p
            for p in others
            if p % B == i % B or (used and used[i % B] != -100 and used[i % B] == used[p % B])
        ]
        total = sum((z[i] @ z[a] / 0.1).exp() for a in others)
        terms = [-((z[i] @ z[p] / 0.1).exp() / total).log() for p in partners]
        expected[i % B] += sum(terms) / len(terms) / 2
    rows = losses.load("sample_contrast")(student, teacher, positives=positives)
    same(rows, expected)


@pytest.mark.parametrize("shape", [(B, 5), (B, L, 5)])
def test_soft_labels_is_its_definition(shape: tuple) -> None:
    student, teacher = model(STUDENT_WIDTH, 0, shape), model(STUDENT_WIDTH, 10, shape)
    for squared, factor in ((False, 1.0), (True, 4.0)):
        pairs = zip(student.logits.view(-1, 5), teacher.logits.view(-1, 5), strict=True)
        rows = [kl(probabilities([*(t / 2)]), probabilities([*(s / 2)])) for s, t in pairs]
        expected = factor * torch.stack(rows).view(shape[:-1])
        if len(shape) == 3:
            expected = expected * MASK
        actual = losses.load("soft_labels")(
            student, teacher, temperature=2.0, squared_temperature=squared
        )
        same(actual, expected)


def test_soft_labels_of_an_impossible_class_are_those_of_the_others() -> None:
    # Heads that rule classes out write -inf; inf - inf must not reach the loss.
    student, teacher = model(STUDENT_WIDTH, 0), model(STUDENT_WIDTH, 10)
    student.logits[:, 2], teacher.logits[:, 2] = -math.inf, -math.inf
    rows, (grad,) = gradient("soft_labels", student, teacher)
    others = [0, 1, 3, 4]
    for side in (student, teacher):
        side.logits = side.logits.detach()[:, others]
    expected_rows, (expected_grad,) = gradient("soft_labels", student, teacher)
    same(rows, expected_rows)
    same(grad[:, others], expected_grad)
    assert torch.equal(grad[:, 2], torch.zeros(B).double())


def test_soft_labels_of_one_logit_is_a_squared_difference() -> None:
    # Softmax of one logit is always 1: a KL would be 0 whatever the student says.
    student, teacher = model(STUDENT_WIDTH, 0, (B, 1)), model(STUDENT_WIDTH, 10, (B, 1))
    gap = student.logits[:, 0] - teacher.logits[:, 0]
    same(losses.load("soft_labels")(student, teacher), gap**2)
    same(losses.load("soft_labels")(student, teacher, temperature=2.0), gap**2 / 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(B, 5), (B, L, 5)])
def test_hard_labels_is_its_definition(shape: tuple, smoothing: float) -> None:
    student = model(STUDENT_WIDTH, 0, shape)
    student.labels.view(-1)[1] = -100
    rows = []
    for z, label in zip(student.logits.view(-1, 5), student.labels.view(-1).tolist(), strict=True):
        logs = [p.log() for p in probabilities([*z])]
        smooth = -(1 - smoothing) * logs[max(label, 0)] - smoothing * sum(logs) / 5
        rows.append(smooth if label != -100 else 0 * z.sum())
    actual = losses.load("hard_labels")(student, label_smoothing=smoothing)
    same(actual, torch.stack(rows).view(shape[:-1]))


def test_hard_labels_of_one_logit_is_a_squared_difference() -> None:
    student = model(STUDENT_WIDTH, 0, (B, 1))
    student.labels = torch.tensor([0.5, -1.0, 3.0, -100.0, 2.0])
    expected = (student.logits[:, 0] - student.labels) ** 2
    expected[3] = 0
    same(losses.load("hard_labels")(student), expected)


def identity(x: Tensor) -> Tensor:
    return x


def sides(name: str, logits: tuple = (B, L, 5)) -> tuple[Any, Any]:
    """A student and a teacher of the same width, of the kind the loss `name` reads."""
    make: dict[str, Callable[[int], Any]] = {
        "trace": lambda seed: model(STUDENT_WIDTH, seed, logits),
        "layer": lambda seed: layer(STUDENT_WIDTH, seed),
        "batch": lambda seed: samples(STUDENT_WIDTH, seed, LABELS),
    }
    make_side = make[constants(name)["SCOPE"]]
    return make_side(0), make_side(20)


def tensors(side: Any) -> list[str]:
    """The floating-point fields of a trace, layer or batch of samples."""
    return [k for k, v in vars(side).items() if isinstance(v, Tensor) and v.is_floating_point()]


WEIGHING = [
    name for name in NAMES if "row_weight" in inspect.signature(losses.load(name)).parameters
]


def rows_of(name: str, student: Any, teacher: Any, **options: Any) -> Tensor:
    own = constants(name)
    extra = (identity,) if own["PROJECTION"] and own["SCOPE"] != "batch" else ()
    inputs = (student, teacher) if constants(name)["TEACHER"] else (student,)
    return losses.load(name)(*inputs, *extra, **options)


def gradient(name: str, student: Any, teacher: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [getattr(student, field).requires_grad_() for field in tensors(student)]
    rows = rows_of(name, student, teacher)
    grads = torch.autograd.grad(rows.sum(), leaves, allow_unused=True)
    return rows.detach(), [grad for grad in grads if grad is not None]


# Zero at student = teacher is what makes it a divergence; the other two have no such zero.
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hard_labels", "sample_contrast")])
def test_a_perfect_student_has_no_loss_and_no_gradient(name: str) -> None:
    rows, grads = gradient(name, sides(name)[0], sides(name)[0])
    assert torch.equal(rows, torch.zeros_like(rows))
    assert grads and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_count_is_never_read(name: str) -> None:
    expected_rows, expected_grads = gradient(name, *sides(name))
    for poison in (math.nan, math.inf):
        student, teacher = sides(name)
        if name == "hard_labels":
            student.labels[0, 1] = -100
            student.logits[0, 1] = poison
            expected_rows[0, 1], expected_grads[0][0, 1] = 0, 0
        else:
            for side in (student, teacher):
                for field in tensors(side):
                    keep = side.keep if isinstance(side, Samples) else MASK
                    keep = MASK.any(1) if field in trace.VECTOR_READS else keep
                    getattr(side, field)[~keep] = poison
        rows, grads = gradient(name, student, teacher)
        torch.testing.assert_close(rows, expected_rows, rtol=0, atol=0)
        for grad, expected in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_real_rows_returns_zeros_of_the_graph(name: str) -> None:
    # Otherwise this rank's backward fails while the other ranks wait for it.
    student, teacher = sides(name)
    for side in (student, teacher):
        if isinstance(side, Samples):
            side.keep = torch.zeros_like(side.keep)
        else:
            side.mask = torch.zeros_like(MASK)
        if name == "hard_labels":
            side.labels = torch.full_like(side.labels, -100)
        for field in tensors(side):
            getattr(side, field).fill_(math.nan)
    rows, grads = gradient(name, student, teacher)
    assert torch.equal(rows, torch.zeros_like(rows))
    assert grads and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_padding_stays_out_of_the_projection() -> None:
    student, teacher = layer(STUDENT_WIDTH, 0), layer(TEACHER_WIDTH, 10)
    projection = torch.nn.Linear(STUDENT_WIDTH, TEACHER_WIDTH, dtype=torch.float64)
    hidden_mse = losses.load("hidden_mse")
    hidden_mse(student, teacher, projection).sum().backward()
    clean = [p.grad.clone() for p in projection.parameters()]
    projection.zero_grad()
    student.hidden[~MASK], teacher.hidden[~MASK] = math.nan, math.nan
    hidden_mse(student, teacher, projection).sum().backward()
    for parameter, expected in zip(projection.parameters(), clean, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "hard_labels"])
def test_gradients_stay_out_of_the_teacher(name: str) -> None:
    student, teacher = sides(name)
    leaves = [
        getattr(side, f).requires_grad_() for side in (student, teacher) for f in tensors(side)
    ]
    rows_of(name, student, teacher).sum().backward()
    half = len(leaves) // 2
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves[:half])
    assert all(leaf.grad is None for leaf in leaves[half:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_fp32_for_half_precision(name: str) -> None:
    student, teacher = sides(name)
    for side in (student, teacher):
        for field in tensors(side):
            setattr(side, field, getattr(side, field).bfloat16())
    rows = rows_of(name, student, teacher)
    assert rows.dtype == torch.float32
    for side in (student, teacher):
        for field in tensors(side):
            setattr(side, field, getattr(side, field).double())
    torch.testing.assert_close(rows.double(), rows_of(name, student, teacher), rtol=1e-4, atol=1e-5)


CHANGES = {
    "embedding_relation": {"temperature": 2.0, "student_scale": 0.1, "teacher_scale": 0.1},
    "attention_relation": {
        "of": ["query", "context"],
        "splits": 2,
        "temperature": 2.0,
        "causal": True,
        "student_scale": 0.1,
        "teacher_scale": 0.1,
    },
    "hidden_mse": {},
    "attention_kl": {},
    "attention_mse": {},
    "cls_cosine": {},
    "embedding_mse": {},
    # `of` says which vector the caller takes, so it cannot change what is done with it.
    "sample_relation": {"temperature": 2.0, "normalize": True, "diagonal": False},
    "sample_contrast": {"temperature": 2.0, "positives": "sample", "normalize": False},
    # Models of unequal vocabularies to be truncated are in test_head.py.
    "soft_labels": {"temperature": 2.0, "squared_temperature": True, "kind": "tvd", "beta": 0.3},
    "hard_labels": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_value(name: str) -> None:
    # T^2 shows only where the temperature is not 1.
    base = {"temperature": 3.0, "kind": "jsd"} if name == "soft_labels" else {}
    plain = rows_of(name, *sides(name), **base).sum().item()
    given = {option for option in options_of(name) if option not in ("backend", "of", "truncate")}
    assert given == set(CHANGES[name]) - {"of"}
    for option, value in CHANGES[name].items():
        changed = rows_of(name, *sides(name), **{**base, option: value}).sum().item()
        assert abs(changed - plain) > 1e-4, option


@pytest.mark.parametrize("name", WEIGHING)
def test_a_loss_that_is_given_weights_sums_its_rows(name: str) -> None:
    weight = torch.linspace(0, 2, B * L, dtype=torch.float64).view(B, L)
    rows = rows_of(name, *sides(name))
    rows = rows.mean(1) if rows.ndim == 3 else rows
    found = rows_of(name, *sides(name), row_weight=weight)
    assert found.ndim == 0 and found > 0
    torch.testing.assert_close(found, (rows * weight).sum())


def without_labels() -> Tensor:
    batch = samples(STUDENT_WIDTH, 0)
    return losses.load("sample_contrast")(batch, batch, positives="label")


REFUSED = {
    "width 6 and the teacher's 12.*splits=4": lambda: losses.load("attention_relation")(
        layer(6, 0), layer(12, 0), splits=4
    ),
    "width 6 and the teacher's 10.*splits=3": lambda: losses.load("attention_relation")(
        layer(6, 0), layer(10, 0)
    ),
    r"of=\['contxt'\].*context": lambda: losses.load("attention_relation")(
        layer(6, 0), layer(6, 0), of=["contxt"]
    ),
    r"of=\[\]": lambda: losses.load("attention_relation")(layer(6, 0), layer(6, 0), of=[]),
    r"\(5, 4, 6\).*\(5, 4, 12\).*project": lambda: losses.load("hidden_mse")(
        layer(6, 0), layer(12, 0), identity
    ),
    r"embedding_mse.*\(5, 4, 6\).*\(5, 4, 12\).*project": lambda: losses.load("embedding_mse")(
        model(6, 0), model(12, 0), identity
    ),
    r"cls_cosine.*\(5, 6\).*\(5, 12\).*project": lambda: losses.load("cls_cosine")(
        layer(6, 0), layer(12, 0), identity
    ),
    "heads.*same.*relation_kl": lambda: losses.load("attention_kl")(
        layer(6, 0, heads=3), layer(6, 0, heads=2)
    ),
    "causal and of a bidirectional.*attention_relation": lambda: losses.load("attention_mse")(
        grouped(3, 0, 4, None, True), grouped(3, 0, 4, None, False)
    ),
    r"\(5, 6\).*\(5, 12\).*[Pp]roject": lambda: losses.load("sample_contrast")(
        samples(6, 0), samples(12, 0)
    ),
    "positives='label'.*positives='sample'": without_labels,
    r"\(5, 3\).*\(5, 2\).*classes": lambda: losses.load("soft_labels")(
        model(6, 0, (B, 3)), model(6, 0, (B, 2))
    ),
    "temperature=0": lambda: losses.load("soft_labels")(model(6, 0), model(6, 0), temperature=0.0),
    r"\(5, 3\).*\(5,\).*None": lambda: losses.load("hard_labels")(
        Trace(MASK, HEADS, logits=randn(B, 3))
    ),
    "label_smoothing=1.0": lambda: losses.load("hard_labels")(model(6, 0), label_smoothing=1.0),
    "label_smoothing=0.1 with 1 classes": lambda: losses.load("hard_labels")(
        model(6, 0, (B, 1)), label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_with_what_was_given(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def source(name: str) -> ast.Module:
    return ast.parse((Path(losses.__file__).parent / f"{name}.py").read_text())


def constants(name: str) -> dict[str, Any]:
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in source(name).body
        if isinstance(node, ast.Assign)
    }


def options_of(name: str) -> dict[str, ast.arg]:
    """The schema of a loss, as config.py reads it: without importing the file."""
    (function,) = (
        n for n in source(name).body if isinstance(n, ast.FunctionDef) and n.name == name
    )
    for default in function.args.kw_defaults:
        ast.literal_eval(default)
    return {arg.arg: arg for arg in function.args.kwonlyargs if arg.arg != "row_weight"}


def test_every_file_is_a_loss() -> None:
    assert schema.names(schema.LOSSES) == ALL_NAMES


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_loss_can_be_read_without_importing_it(name: str) -> None:
    found = constants(name)
    required = {"ROWS", "SCOPE", "READS", "TEACHER", "PROJECTION"}
    assert required <= set(found) <= required | {"SAME_HEADS", "PACKED"}
    assert found["ROWS"] in ("token", "sample", "label")
    assert found["SCOPE"] in ("trace", "layer", "module", "batch")
    known = {
        "trace": ("embedding", "final", "logits"),
        "layer": trace.LAYER_READS,
        "module": ROLES,
        "batch": trace.VECTOR_READS,
    }
    assert found["READS"] and set(found["READS"]) <= set(known[found["SCOPE"]])
    simple = r"(float|int|bool|str|list\[str\]|Literal\[.*\])( \| None)?"
    for argument in options_of(name).values():
        annotation = ast.unparse(argument.annotation)
        assert re.fullmatch(simple, annotation), annotation
    parameters = list(inspect.signature(losses.load(name)).parameters)
    assert parameters[0] == "student" and ("teacher" in parameters) == found["TEACHER"]
    if found["ROWS"] == "label":
        over = inspect.signature(losses.load(name, "over_vocabulary")).parameters.values()
        options = {p.name: p.default for p in over if p.kind == p.KEYWORD_ONLY}
        plain = inspect.signature(losses.load(name)).parameters
        assert {**options, "backend": 0} == {n: plain[n].default for n in options_of(name)} | {
            "backend": 0
        }


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_loss_imports_traces_and_kernels_only(name: str) -> None:
    for node in ast.walk(source(name)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            ours = (
                "mlkd_dist.trace",
                "mlkd_dist.models.head",
                "mlkd_dist.losses._",
                "mlkd_kernels",
            )
            allowed = ("torch", "typing", "collections", "math", *ours)
            assert module.startswith(allowed), module
