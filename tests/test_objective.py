"""How terms are put together: weights, averages, layers, projections, rows that do not count."""

from typing import Any

import pytest
import torch
from torch import nn

from mlkd_dist.config import OpenConfig, from_mapping
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.processes.world import World
from mlkd_dist.schedule import Opening
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Layer, Trace

pytestmark = pytest.mark.usefixtures("one_process")

B, L, STUDENT, TEACHER, LAYERS = 3, 5, 4, 6, 2


def options(losses: dict[str, dict], task: str = "classification") -> dict[str, dict]:
    """With every default filled in, as a run has them."""
    config = from_mapping(
        {
            "teacher": {"path": "someone/teacher"},
            "student": {"path": "someone/student"},
            "task": {"kind": task},
            "data": {"train": "x.jsonl"},
            "stages": [{"steps": 1, "losses": losses}],
        }
    )
    return config.stages[0].losses


def trace(width: int, seed: int, mask: torch.Tensor) -> Trace:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    made = Trace(mask, heads=2, embedding=random(B, L, width), logits=random(B, 3))
    made.labels = torch.tensor([0, 2, 0])
    for i in range(LAYERS):
        made.layers[i] = Layer(mask, 2, context=random(B, L, width), hidden=random(B, L, width))
    for layer in made.layers.values():
        layer.cls, layer.mean = random(B, width), random(B, width)
    made.vectors = {kind: random(B, width) for kind in ("cls", "mean")}
    return made


def batch(lengths: tuple[int, ...] = (5, 3, 1), keep: tuple[bool, ...] = (True,) * B) -> Batch:
    mask = torch.arange(L) < torch.tensor(lengths).unsqueeze(1)
    kept = torch.tensor(keep)
    labels = torch.tensor([0, 2, 0]).masked_fill(~kept, -100)
    return Batch({"attention_mask": mask.long()}, kept, labels, kept)


def value(
    losses: dict[str, dict], given: Batch | None = None, width: int = STUDENT, perturb: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and shares of one micro-batch of one process."""
    given = batch() if given is None else given
    mask = given.inputs["attention_mask"].bool()
    objective = Objective(
        options(losses), "uniform", Widths(width, LAYERS), Widths(TEACHER, LAYERS), "auto",
        World(0, 1, 0, torch.device("cpu")),
    )  # fmt: skip
    projections = objective.projections()
    with torch.no_grad():
        for i, projection in enumerate(projections.values()):
            projection.weight.mul_(1 + i if perturb else 1)
    student, teacher = trace(width, 1, mask), trace(TEACHER, 2, mask)
    rows = objective.global_rows([given])
    peers = objective.peers([given], [teacher], None)
    return objective(student, teacher, given, rows, projections, peers, 0)


def one(losses: dict[str, dict], **named: Any) -> float:
    return value(losses, **named)[0].item()


def test_hard_labels_are_a_mean_over_what_is_labelled() -> None:
    """Of `soft_labels` every row counts."""
    given = batch()
    given.labels[1] = -100
    student = trace(STUDENT, 1, given.inputs["attention_mask"].bool())
    objective = Objective(
        options({"hard_labels": {}, "soft_labels": {}}), "uniform", Widths(STUDENT, LAYERS),
        Widths(STUDENT, LAYERS), "auto", World(0, 1, 0, torch.device("cpu")),
    )  # fmt: skip
    student.labels, rows = given.labels, objective.global_rows([given])
    teacher = trace(STUDENT, 2, student.mask)
    _, shares = objective(student, teacher, given, rows, objective.projections(), None, 0)
    expected = torch.nn.functional.cross_entropy(student.logits[[0, 2]], torch.tensor([0, 0]))
    assert shares[0].item() == pytest.approx(expected.item(), rel=1e-6)
    p, q = teacher.logits.log_softmax(-1), student.logits.log_softmax(-1)
    assert shares[1].item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    losses = {
        "hidden_mse": {"weight": 2.0},
        "embedding_relation": {"weight": 0.5},
        "sample_relation": {},
        "soft_labels": {"weight": 0},
    }
    total, shares = value(losses)
    weights = torch.tensor([2.0, 0.5, 1.0, 0.0])
    assert total.item() == pytest.approx((shares * weights).sum().item())
    for share, (name, given) in zip(shares, losses.items(), strict=True):
        assert one({name: given | {"weight": 1.0}}) == pytest.approx(share.item())


def test_hidden_mse_from_its_formula() -> None:
    """Sum over layers of the mean over samples of the mean over real tokens and the width."""
    mask = batch().mask
    student, teacher = trace(STUDENT, 1, mask), trace(TEACHER, 2, mask)
    eye = torch.eye(STUDENT, TEACHER)
    per_sample, per_token = 0.0, 0.0
    for i in range(LAYERS):
        gap = (student.layers[i].hidden @ eye - teacher.layers[i].hidden).square().mean(-1)
        per_sample += sum(gap[b, mask[b]].mean().item() for b in range(B)) / B
        per_token += gap[mask].mean().item()
    assert one({"hidden_mse": {}}) == pytest.approx(per_sample, rel=1e-5)
    assert one({"hidden_mse": {"average": "token"}}) == pytest.approx(per_token, rel=1e-5)
    assert one({"hidden_mse": {"sum_layers": "mean"}}) == pytest.approx(per_sample / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("hidden_mse", {"layers": "last"}),
        ("hidden_mse", {"layers": [[0, 1], [1, 0]]}),
        ("hidden_mse", {"average": "token"}),
        ("hidden_mse", {"sum_layers": "mean"}),
        ("hidden_mse", {"shared_projection": False}),
        ("attention_relation", {"splits": 1}),
        ("attention_relation", {"average": "token"}),
        ("embedding_relation", {"average": "token"}),
        ("cls_cosine", {"of": "mean"}),
        ("cls_cosine", {"sum_layers": "mean"}),
        ("embedding_mse", {"average": "token"}),
        ("sample_relation", {"of": "mean"}),
        ("sample_contrast", {"of": "mean"}),
        ("sample_contrast", {"positives": "sample"}),
    ],
)
def test_every_option_changes_the_value(name: str, given: dict) -> None:
    assert abs(one({name: given}) - one({name: {}})) > 1e-5


def test_projections_exist_where_they_are_needed() -> None:
    def keys(losses: dict, width: int) -> list[str]:
        objective = Objective(
            options(losses), "uniform", Widths(width, LAYERS), Widths(TEACHER, LAYERS), "auto",
            World(0, 1, 0, torch.device("cpu")),
        )  # fmt: skip
        return sorted(objective.projections())

    assert keys({"hidden_mse": {}, "sample_contrast": {}}, STUDENT) == [
        "hidden_mse",
        "sample_contrast",
    ]
    assert keys({"hidden_mse": {}, "sample_contrast": {}}, TEACHER) == []
    assert keys({"hidden_mse": {"project": "always"}}, TEACHER) == ["hidden_mse"]
    assert keys({"cls_cosine": {}, "embedding_mse": {}}, STUDENT) == ["cls_cosine", "embedding_mse"]
    per_layer = {"hidden_mse": {"shared_projection": False}}
    assert keys(per_layer, STUDENT) == ["hidden_mse_0", "hidden_mse_1"]


def opened(losses: dict[str, dict], kind: str, phase: int) -> tuple[Objective, nn.ModuleDict]:
    objective = Objective(
        options(losses), "uniform", Widths(STUDENT, LAYERS), Widths(TEACHER, LAYERS), "auto",
        World(0, 1, 0, torch.device("cpu")),
    )  # fmt: skip
    rule = OpenConfig(kind, threshold=0.05, keep_soft_labels=False, check_every=1)
    objective.opening = Opening(rule, objective.layers, 12)
    objective.opening.load_state_dict({"phase": phase, "total": 0.0, "count": 0})
    return objective, objective.projections()


STACK: dict[str, dict] = {
    "cls_cosine": {"shared_projection": False},
    "hidden_mse": {},
    "soft_labels": {},
    "sample_relation": {},
}


@pytest.mark.parametrize(
    ("kind", "phase", "layers"),
    [("pid", 0, [0]), ("pid", 1, [1]), ("pid", 2, []), ("sid", 0, [0]), ("sid", 1, [0, 1])],
)
def test_closed_layers_are_neither_kept_nor_computed(
    kind: str, phase: int, layers: list[int]
) -> None:
    objective, projections = opened(STACK, kind, phase)
    mask = batch().inputs["attention_mask"].bool()
    student, teacher = trace(STUDENT, 1, mask), trace(TEACHER, 2, mask)
    for closed in {0, 1} - set(layers):
        # Computing it would raise.
        student.layers[closed] = teacher.layers[closed] = Layer(mask, 2)
    if layers:
        student.logits = None
    for side in (0, 1):
        needs = objective.needs(side)
        assert sorted(needs.layers) == layers
        assert needs.model == (frozenset() if layers else {"logits", "cls"})
    given = batch()
    peers = objective.peers([given], [teacher], None)
    assert (peers is None) == bool(layers)
    rows = objective.global_rows([given])
    total, shares = objective(student, teacher, given, rows, projections, peers, 0)
    counted = [name for name, share in zip(objective.names, shares, strict=True) if share != 0]
    assert counted == objective.open_names == ([*STACK][:2] if layers else [*STACK][2:])
    assert total.item() == pytest.approx(shares.sum().item(), rel=1e-6)
    told = objective.open_layers()
    assert [key for key, value in told.items() if value] == (
        [f"open/layer_{k}" for k in layers] or ["open/prediction"]
    )


def test_matrices_of_closed_layers_are_not_kept() -> None:
    objective, _ = opened({"module_mse": {"input": "teacher"}, "soft_labels": {}}, "pid", 1)
    assert [sorted(objective.needs(side).matrices) for side in (0, 1)] == [[1], [1]]


def test_a_projection_that_no_open_term_uses_gets_a_gradient_of_zero() -> None:
    """None at all would leave ZeRO-3 with that of an earlier step."""
    objective, projections = opened(STACK, "pid", 1)
    mask = batch().inputs["attention_mask"].bool()
    given = batch()
    args = (given, objective.global_rows([given]), projections, None, 0)
    objective(trace(STUDENT, 1, mask), trace(TEACHER, 2, mask), *args)[0].backward()
    assert sorted(projections) == ["cls_cosine_0", "cls_cosine_1", "hidden_mse"]
    assert torch.count_nonzero(projections["cls_cosine_0"].weight.grad) == 0
    for used in ("cls_cosine_1", "hidden_mse"):
        assert projections[used].weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("sum_layers", ["sum", "mean"])
def test_the_rule_is_told_the_cosine_loss_per_open_layer(sum_layers: str) -> None:
    losses = STACK | {"cls_cosine": {"sum_layers": sum_layers}}
    objective, _ = opened(losses, "sid", 1)
    shares = torch.tensor([0.5, 9.0, 0.0, 0.0])
    told = objective.mean_cosine(shares).item()
    assert told == pytest.approx(0.25 if sum_layers == "sum" else 0.5)
    # Step 8 is the first of the classifier by its budget; a small loss opens it before.
    assert not objective.end_step(5, shares)
    assert objective.end_step(6, shares * 0.01) and objective.opening.predicts_only


def test_a_cosine_loss_without_an_open_layer_opens_nothing() -> None:
    objective, _ = opened(STACK | {"cls_cosine": {"layers": "last"}}, "pid", 0)
    assert objective.opening.watches and not objective.end_step(0, torch.zeros(4))


def test_samples_that_do_not_count_change_nothing() -> None:
    """The third sample fills the batch: whatever it holds, the value is that of the first two."""
    losses: dict[str, dict] = {
        name: {}
        for name in (
            "embedding_relation embedding_mse attention_relation hidden_mse cls_cosine "
            "sample_relation sample_contrast soft_labels hard_labels"
        ).split()
    }
    kept = (True, True, False)
    _, long = value(losses, batch((5, 3, 5), kept))
    _, short = value(losses, batch((5, 3, 1), kept))
    assert torch.allclose(long, short, atol=1e-7)
    _, all_three = value(losses, batch((5, 3, 1)))
    assert (all_three - short).abs().min() > 1e-5


def test_a_batch_without_a_counting_row_is_zero_with_a_gradient() -> None:
    """Such a loss must reach the engine's backward, or the other processes wait for ever."""
    losses: dict[str, dict] = {"hidden_mse": {}, "hard_labels": {}, "sample_contrast": {}}
    total, shares = value(losses, batch((5, 3, 1), (False,) * B))
    assert total.item() == 0 and shares.tolist() == [0, 0, 0]
    assert total.requires_grad


def test_sample_terms_reach_the_projection_once() -> None:
    """The gradient of a term over two micro-batches, one live at a time, is that of the whole."""
    world = World(0, 1, 0, torch.device("cpu"))
    losses = options({"sample_contrast": {}, "sample_relation": {}})
    objective = Objective(losses, "uniform", Widths(STUDENT, 2), Widths(TEACHER, 2), "auto", world)
    given = [batch(), batch((2, 4, 5))]
    seen = [trace(TEACHER, 2, b.mask) for b in given]
    ours = [trace(STUDENT, seed, b.mask) for seed, b in zip((5, 6), given, strict=True)]
    projections = objective.projections()
    weight: nn.Parameter = projections["sample_contrast"].weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    vectors = [objective.student_vectors(t, projections) for t in ours]
    peers = objective.peers(given, seen, vectors)
    rows = objective.global_rows(given)
    shares = torch.zeros(2)
    for index in (0, 1):
        args = (given[index], rows, projections, peers, index)
        loss, share = objective(ours[index], seen[index], *args)
        loss.backward()
        shares += share
    by_parts = weight.grad.clone()

    def joined(traces: list[Trace]) -> Trace:
        whole = Trace(torch.cat([t.mask for t in traces]), 2)
        whole.vectors = {k: torch.cat([t.vectors[k] for t in traces]) for k in ("cls", "mean")}
        return whole

    both = Batch(
        {"attention_mask": torch.cat([b.inputs["attention_mask"] for b in given])},
        torch.cat([b.keep for b in given]),
        torch.cat([b.labels for b in given]),
        torch.cat([b.label_keep for b in given]),
    )
    weight.grad = None
    whole = joined(seen)
    args = (
        both,
        objective.global_rows([both]),
        projections,
        objective.peers([both], [whole], None),
        0,
    )
    loss, share = objective(joined(ours), whole, *args)
    loss.backward()
    assert torch.allclose(shares, share, atol=1e-6)
    assert torch.allclose(by_parts, weight.grad, atol=1e-6) and weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "ours", "theirs"),
    [
        ({"of": ["query", "up"]}, ["output"], ["output"]),
        ({"of": ["query", "up"], "input": "teacher"}, ["apply"], ["input", "output"]),
    ],
)
def test_matrices_are_kept_as_the_loss_takes_them(given: dict, ours: list, theirs: list) -> None:
    """With the teacher's input nothing of the student's own pass is needed."""
    losses = options({"module_mse": given | {"layers": [[1, 0]]}, "hidden_mse": {}})
    both = Widths(STUDENT, LAYERS)
    objective = Objective(losses, "last", both, both, "auto", World(0, 1, 0, torch.device("cpu")))
    for side, layer, fields in ((0, 1, ours), (1, 0, theirs)):
        needs = objective.needs(side)
        reads = {(role, field) for role in ("query", "up") for field in fields}
        assert needs.matrices == {layer: reads} and needs.layers == {1: {"hidden"}}
        assert needs.depth() == 2
