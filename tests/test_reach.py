"""Losses whose gradient does not reach the student."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BERT, LOGIT_LOSSES, LOSSES
from test_objective import options
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from mlkd_dist.config import UserError
from mlkd_dist.models.tap import TAP, capture
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.processes.world import World
from mlkd_dist.student import Student
from mlkd_dist.tasks import Batch
from mlkd_dist.watching import reach as reaching
from mlkd_dist.watching.reach import PATIENT, Reach


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


@pytest.fixture
def reach(model: nn.Sequential) -> Reach:
    found = Reach()
    found.into(model.parameters())
    return found


ROWS = torch.ones(2, 3)


def test_what_trains_any_weight_is_left_alone(model: nn.Sequential, reach: Reach) -> None:
    reach.check("hidden_mse", 0, model(ROWS).square().sum())
    # A loss of zero trains, too: a student may begin as its teacher.
    reach.check("hidden_mse", 1, (model(ROWS) * 0).sum())
    model[2].requires_grad_(False)
    reach.into(model.parameters())
    reach.check("embedding_mse", None, model(ROWS).sum())
    hidden = torch.utils.checkpoint.checkpoint(model, ROWS, use_reentrant=False)
    reach.check("soft_labels", None, hidden.sum())


@pytest.mark.parametrize("how", ["detached", "projection", "constant", "reentrant"])
def test_what_trains_none_is_refused_by_name(model: nn.Sequential, reach: Reach, how: str) -> None:
    projection = nn.Linear(3, 3)
    value = {
        "detached": lambda: model(ROWS).detach().sum(),
        # What a loss after a projection becomes: it falls, and the student learns nothing.
        "projection": lambda: projection(model(ROWS).detach()).sum(),
        "constant": lambda: torch.zeros(()),
        # No input of the block requires a gradient: its output has none, whatever its weights do.
        "reentrant": lambda: projection(
            torch.utils.checkpoint.checkpoint(model, ROWS, use_reentrant=True)
        ).sum(),
    }[how]()
    with pytest.raises(UserError, match=r"losses\.hidden_mse, student layer 1: its gradient"):
        reach.check("hidden_mse", 1, value)


def test_each_loss_and_layer_is_looked_at_once(model: nn.Sequential, reach: Reach) -> None:
    sound, lost = model(ROWS).sum(), torch.zeros(())
    with torch.no_grad():
        reach.check("hidden_mse", 0, lost)
    reach.check("hidden_mse", 0, sound)
    reach.check("hidden_mse", 0, lost)
    for name, layer in (("hidden_mse", 1), ("cls_cosine", 0), ("hidden_mse", None)):
        with pytest.raises(UserError):
            reach.check(name, layer, lost)


def pair(seeds: tuple[int, int]) -> list[BertForSequenceClassification]:
    """Student and teacher of one shape; of the same seed, the same weights."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        made = BertConfig(
            **BERT | {"num_hidden_layers": 2}, num_labels=3, attn_implementation=TAP + "sdpa"
        )
        models.append(BertForSequenceClassification(made).eval())
    return models


class Steps:
    """Of a student as a stage trains it, without an engine around it; `plant` changes what the
    losses of that name become."""

    def __init__(
        self,
        losses: dict[str, dict],
        seeds: tuple[int, int] = (0, 1),
        checkpointing: bool = False,
        **plant: Callable[[Callable, Any], Tensor],
    ):
        model, self.teacher = pair(seeds)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        widths = Widths(BERT["hidden_size"], 2)
        world = World(0, 1, 0, torch.device("cpu"))
        self.objective = Objective(options(losses), "uniform", widths, widths, "auto", world)
        for term in self.objective.terms:
            if change := plant.get(term.name):
                function = term.function
                term.function = lambda *read, f=function, c=change: c(f, *read)
        self.student = Student(model, self.objective)

    def step(self) -> None:
        ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0], [2, 11, 3, 0, 0]])
        mask, keep = (ids > 0).long(), torch.ones(3, dtype=torch.bool)
        batch = Batch({"input_ids": ids, "attention_mask": mask}, keep, torch.arange(3), keep)
        with torch.no_grad():
            needs = self.objective.needs(1)
            seen = capture(self.teacher, self.teacher, batch.inputs, needs, batch.labels)
        rows = self.objective.global_rows([batch])
        peers = self.objective.peers([batch], [seen], None)
        loss, _ = self.student(batch, seen, rows, peers, 0)
        sound = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        (loss * sound).backward()
        self.objective.reach.verdict()


ALL = LOSSES | LOGIT_LOSSES | {"module_mse": {}, "attention_kl": {}, "attention_mse": {}}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_loss_is_found_to_train(checkpointing: bool) -> None:
    steps = Steps(ALL, checkpointing=checkpointing)
    steps.step()
    reach, of_layers = steps.objective.reach, {t.name for t in steps.objective.terms if t.pairs}
    expected = {(name, k) for name in of_layers for k in (0, 1)}
    expected |= {(name, None) for name in ALL.keys() - of_layers}
    # All at the first step, and nothing is looked at again.
    assert reach.settled == expected and not reach.looks
    steps.student.zero_grad()
    steps.step()
    assert not reach.counts


@pytest.mark.usefixtures("one_process")
def test_what_is_looked_at_trains_as_what_is_not() -> None:
    """To the last bit: a run that goes on looks again."""
    gradients = []
    for looked_at in (True, False):
        steps = Steps(ALL)
        if not looked_at:
            steps.objective.reach.weights = set()
        steps.step()
        assert bool(steps.objective.reach.settled) == looked_at
        gradients.append([weight.grad for weight in steps.student.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def flat(function: Callable, ours: Any, theirs: Any, *rest: Any) -> Tensor:
    """A graph that leads to the student, and nothing that comes back through it."""
    return function(ours, theirs, *rest).detach() + 0 * function(ours, theirs, *rest)


def lost(function: Callable, *read: Any) -> Tensor:
    return function(*read) * math.nan


def wild(function: Callable, *read: Any) -> Tensor:
    rows = function(*read)
    # The derivative of a root at 0.
    return rows.detach() + (rows - rows.detach()).sqrt()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "plant, why",
    [
        (flat, "its gradient 0 in all"),
        (lost, "is not finite in any"),
        (wild, "its gradient is not finite"),
    ],
)
@pytest.mark.parametrize("name", ["hidden_mse", "soft_labels", "sample_relation", "module_mse"])
def test_what_would_train_nothing_is_refused_by_its_numbers(
    name: str, plant: Callable, why: str
) -> None:
    steps = Steps({"embedding_mse": {}, name: LOSSES.get(name, {})}, **{name: plant})
    layer = ", student layer 0" if name in ("hidden_mse", "module_mse") else ""
    with pytest.raises(UserError, match=f"losses.{name}{layer}: where it first counts.*{why}"):
        steps.step()


@pytest.mark.usefixtures("one_process")
def test_a_loss_over_a_vocabulary_is_looked_at_by_itself() -> None:
    reach, weight = Reach(), nn.Parameter(torch.randn(7, 4))
    reach.into([weight])
    reach.rows = {"soft_labels": torch.tensor(2.0), "hard_labels": torch.tensor(2.0)}
    hidden = torch.ones(2, 4) * weight[0]

    def step(scale: float) -> None:
        from mlkd_dist.models.head import HeadRows

        total = torch.zeros(())
        for name, factor in (("soft_labels", 1.0), ("hard_labels", scale)):
            read = reach.shown(name, None, HeadRows(hidden, weight))
            value = factor * (read.hidden @ read.weight.mT).square().sum() + (factor == 0)
            reach.check(name, None, value)
            total = total + value
        total.backward(retain_graph=True)
        reach.verdict()

    with pytest.raises(UserError, match="losses.hard_labels: .* it is 0.5, and its gradient 0"):
        step(0.0)
    step(1.0)
    assert reach.settled == {("soft_labels", None), ("hard_labels", None)}


@pytest.mark.usefixtures("one_process")
def test_a_student_that_begins_as_its_teacher_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reaching, "say", said.append)
    steps = Steps({"hidden_mse": {}, "hard_labels": {}}, seeds=(0, 0))
    reach = steps.objective.reach
    for _ in range(3):
        steps.step()
    assert reach.settled == {("hard_labels", None)} and set(reach.looks.values()) == {3}
    with torch.no_grad():
        for weight in steps.student.model.bert.encoder.layer[1].parameters():
            weight.add_(0.01)
    steps.step()
    assert reach.settled == {("hard_labels", None), ("hidden_mse", 1)}
    for _ in range(PATIENT):
        assert not said or steps.step() is None
        steps.step()
    assert (
        len(said) == 1 and "losses.hidden_mse, student layer 0: loss and gradient were 0" in said[0]
    )
    assert not reach.counts and ("hidden_mse", 0) in reach.settled


@pytest.mark.usefixtures("one_process")
def test_a_loss_without_weight_and_a_step_that_is_skipped_are_left_alone() -> None:
    Steps({"hidden_mse": {"weight": 0}, "hard_labels": {}}).step()
    # One row is not finite, which makes every gradient of this pass so.
    broken = SimpleNamespace(on=True)

    def once(function: Callable, *read: Any) -> Tensor:
        rows = function(*read)
        return rows * torch.tensor([math.nan if broken.on else 1.0, 1.0, 1.0])

    def sound(function: Callable, *read: Any) -> Tensor:
        return function(*read)

    steps = Steps({"hidden_mse": {}, "hard_labels": {}}, hard_labels=once, hidden_mse=sound)
    reach = steps.objective.reach
    reach.counts = {}
    with pytest.raises(UserError, match="losses.hard_labels: .*not finite in any row"):
        steps.step()
    # Another process's rows are finite.
    reach.judge(("hard_labels", None), [0, 1, 1, 1, 2.0, 1])
    assert not reach.settled & {("hard_labels", None)}
    broken.on = False
    steps.student.zero_grad()
    steps.step()
    assert ("hard_labels", None) in reach.settled


@pytest.mark.usefixtures("one_process")
def test_a_map_that_begins_as_the_identity_is_waited_for() -> None:
    """Of a narrower student: what its teacher has more is no business of it at first."""
    reach = Reach()
    reach.projected.add("embedding_mse")
    zero = [0, 0, 1, 0, 0.5, 0]
    for _ in range(PATIENT - 1):
        reach.judge(("embedding_mse", None), zero)
    with pytest.raises(UserError, match="losses.embedding_mse: .* it is 0.5, and its gradient 0"):
        reach.judge(("embedding_mse", None), zero)
