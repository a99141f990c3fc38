"""How well the student does while it trains, and which of its states was the best."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mlkd_dist.checkpoint import Checkpoints, NotSaved, Position
from mlkd_dist.engine import Engine, gathered
from mlkd_dist.evaluate import Evaluator
from mlkd_dist.metrics import Metrics
from mlkd_dist.processes.signals import say
from mlkd_dist.run import on_first
from mlkd_dist.student import Student
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Needs, Trace


class Validation:
    """Of one run: the student on the held-out rows, every so many steps of a stage and after its
    last one.

    It is run in its own engine, without dropout and without a random number drawn, so that its
    weights are those of a run that is not evaluated. Its best state is kept in the last stage
    alone: earlier ones have other losses, and what was best for these need not lead anywhere. Where
    two are as good, the earlier one is kept.
    """

    def __init__(self, evaluator: Evaluator):
        self.evaluator, self.run = evaluator, evaluator.run
        self.decides = self.run.task.decides
        # Asked to stop, a run saves at once and evaluates when it goes on.
        self.owed = False
        self.teacher = self.said_by_teacher() if self.decides.by_teacher else {}

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owed = state["owed"]

    def due(self, at: Position) -> bool:
        """Whether the stage's step before `at`, which is not its last, is one to evaluate after."""
        return at.step % self.run.config.run.evaluate_every == 0

    def __call__(
        self,
        at: Position,
        engine: Engine,
        student: Student,
        metrics: Metrics,
        checkpoints: Checkpoints,
    ) -> None:
        """Evaluate, log, and keep what is better than all before. All processes call this."""
        start = time.perf_counter()
        self.owed = False
        measured = self.measure(engine)
        if at.stage == len(self.run.config.stages) - 1:
            value = measured.get(self.decides.measure)
            if self.better(value, checkpoints.best):
                best = {"step": at.done, "measure": self.decides.measure, "value": value}
                try:
                    checkpoints.save_best(best, student.model, self.run.tokenizer)
                except NotSaved as error:
                    say(
                        f"warning: the student of step {at.done}, the best so far, is not kept: "
                        f"{error}; the run goes on."
                    )
        metrics.validated(at.step - 1, measured, time.perf_counter() - start)

    def better(self, value: float | None, best: dict[str, Any] | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        if best is None or best["measure"] != self.decides.measure:
            return True
        return value > best["value"] if self.decides.higher else value < best["value"]

    def measure(self, engine: Engine) -> dict[str, float]:
        """By name, the same on all processes."""
        needs = Needs(model=self.run.task.reads)
        with torch.no_grad(), undisturbed(engine), self.no_draws():
            outputs = self.evaluator.outputs(lambda batch: seen(engine, batch, needs))
        return on_first(self.run.world, lambda: self.measures(outputs))

    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        task = self.run.task
        found = task.quality(outputs) | task.loss(outputs)
        return found | (task.agreement(outputs, self.teacher) if self.teacher else {})

    def no_draws(self) -> AbstractContextManager[None]:
        """After it random numbers are what they would have been without it."""
        device = self.run.world.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def said_by_teacher(self) -> dict[str, Tensor]:
        """Of the held-out rows; it is gone before a student is there."""
        teacher = self.run.config.teacher
        settings = self.evaluator.settings(teacher.dtype, teacher.attention)
        with self.no_draws():
            model = self.evaluator.load(teacher.path, settings, Needs(model=self.run.task.reads))
            found = self.evaluator.outputs(model)
            model.close()
        return found


def seen(engine: Engine, batch: Batch, needs: Needs) -> Trace:
    trace = engine(batch, needs=needs)
    if trace.head is not None:
        trace.head = replace(trace.head, gather=gathered)
    return trace


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Without dropout while open."""
    engine.eval()
    try:
        yield
    finally:
        engine.train()


def undecided(kind: str, held_out: Dataset) -> str | None:
    """What these rows lack to tell a better student from a worse one; None where nothing."""
    if kind == "classification" and max(held_out["labels"]) < 0:
        return "none of the held-out rows has a known label"
    if kind == "regression" and len(set(held_out["labels"])) < 2:
        return "the held-out rows have not two different labels"
    if kind == "embedding" and len(held_out) < 3:
        return f"there are {len(held_out)} held-out texts, which are less than three pairs"
    return None
