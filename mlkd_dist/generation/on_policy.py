"""Steps that learn from what a model says itself: the student after the prompts of a batch, or the
teacher, instead of the completions that the data has.

Agarwal et al. 2024 (arXiv 2306.13649) for the student's, Kim and Rush 2016 (arXiv 1606.07947) for
the teacher's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from mlkd_dist.config import OnPolicyConfig, StageConfig
from mlkd_dist.engine import gathered
from mlkd_dist.generation.generate import drawing, generate
from mlkd_dist.metrics import Clock
from mlkd_dist.processes.world import all_reduce
from mlkd_dist.run import Run
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher

# Streams of random numbers that no other part of a run draws from.
WHICH_STEPS, WHICH_TOKENS = 0x0A, 0x0B


class Twin:
    """A model as it is to generate with: its modules without the hooks of its engine, in evaluation
    mode, on weights that are lent to it while it is open.

    Under ZeRO-3 the weights are gathered once for that time. With the engine's hooks each new token
    would gather all of them again, on all processes, for as long as the longest answer of any.
    """

    # One process need not wait for another while it generates.
    sharded = False

    def __init__(self, model: PreTrainedModel):
        """Made before the engine is, which puts its hooks into the model's modules."""
        self.model = model
        empty = {
            id(weight): nn.Parameter(weight.detach().new_empty(0), requires_grad=False)
            for weight in model.parameters()
        }
        self.twin = copy.deepcopy(model, empty).eval()

    @contextmanager
    def opened(self) -> Iterator[PreTrainedModel]:
        """All processes open it."""
        pairs = list(zip(self.twin.parameters(), self.model.parameters(), strict=True))
        with gathered([theirs for _, theirs in pairs]):
            for ours, theirs in pairs:
                ours.data = theirs.data
            try:
                yield self.twin
            finally:
                # Else what was gathered would stay.
                for ours, _ in pairs:
                    ours.data = ours.data.new_empty(0)


class Speaker:
    """The teacher, who may lie sharded while it generates: it may be too large to gather."""

    def __init__(self, teacher: Teacher):
        self.teacher, self.sharded = teacher, teacher.engine is not None

    @contextmanager
    def opened(self) -> Iterator[PreTrainedModel]:
        yield self.teacher.model


def speaks(stage: StageConfig) -> str | None:
    """Who answers prompts in this stage."""
    settings = stage.on_policy
    return settings.by if settings is not None and settings.fraction > 0 else None


def stage_policy(
    run: Run, stage: StageConfig, student: PreTrainedModel, teacher: Teacher | None
) -> "Policy | None":
    """Before the student's engine is made."""
    if speaks(stage) is None:
        return None
    speaker = Speaker(teacher) if speaks(stage) == "teacher" else Twin(student)
    return Policy(stage.on_policy, run, speaker)


@dataclass
class Policy:
    """Of one stage: which of its steps learn from generated completions, and these.

    Both are functions of seed, step and place in the global batch: the same on every process,
    however the batch is spread, and in a run that goes on.
    """

    settings: OnPolicyConfig
    run: Run
    speaker: Twin | Speaker
    # Since the last time they were logged, on all processes.
    steps: int = 0
    answers: int = 0
    tokens: int = 0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.run.world.device)

    def takes(self, step: int) -> bool:
        drawn = np.random.default_rng([WHICH_STEPS, self.run.config.run.seed, step]).random()
        return bool(drawn < self.settings.fraction)

    def __call__(self, step: int, micro_batches: list[Batch]) -> list[Batch]:
        """The micro-batches that step `step` of the run learns from."""
        if not self.takes(step):
            return micro_batches
        with self.clock(), self.speaker.opened() as model:
            said = [self.said(model, step, *each) for each in enumerate(micro_batches)]
        self.count(micro_batches, said)
        return [self.answered(*each) for each in zip(micro_batches, said, strict=True)]

    def said(
        self, model: PreTrainedModel, step: int, index: int, batch: Batch
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer) of every row of micro-batch number `index`."""
        settings, config, world = self.settings, self.run.config, self.run.world
        prompts = [prompt for row in batch.rows for prompt, _ in self.run.task.examples(row)]
        first = (index * world.size + world.rank) * len(prompts)
        draw = None
        if settings.temperature > 0:
            numbers = np.stack(
                [self.numbers(step, slot) for slot in range(first, first + len(prompts))]
            )
            numbers = torch.from_numpy(numbers).to(world.device)
            start = max(map(len, prompts))
            draw = drawing(numbers, start, settings.temperature, settings.top_p)
        answers = generate(
            model,
            prompts,
            self.run.tokenizer,
            world.device,
            settings.max_new_tokens,
            config.data.max_length,
            self.speaker.sharded,
            draw,
        )
        return list(zip(prompts, answers, strict=True))

    def numbers(self, step: int, slot: int) -> np.ndarray:  # [max_new_tokens] of [0, 1)
        seed = [WHICH_TOKENS, self.run.config.run.seed, step, slot]
        return np.random.default_rng(seed).random(self.settings.max_new_tokens)

    def answered(self, batch: Batch, said: list[tuple[list[int], list[int]]]) -> Batch:
        """Collated as any other, so that labels and positions are made in one place."""
        rows = [self.run.task.answered(prompt, answer) for prompt, answer in said]
        made = self.run.task.collate(rows, batch.keep.tolist(), self.run.tokenizer)
        return made.to(self.run.world.device)

    def count(
        self, micro_batches: list[Batch], said: list[list[tuple[list[int], list[int]]]]
    ) -> None:
        lengths = [
            len(answer)
            for batch, pairs in zip(micro_batches, said, strict=True)
            for keep, (_, answer) in zip(batch.keep.tolist(), pairs, strict=True)
            if keep
        ]
        counts = torch.tensor([len(lengths), sum(lengths)], device=self.run.world.device)
        answers, tokens = all_reduce(counts).tolist()
        self.steps, self.answers = self.steps + 1, self.answers + answers
        self.tokens += tokens

    def logged(self, steps: int) -> dict[str, float]:
        """Of the last `steps` steps: which share of them, tokens of an answer, and seconds that
        this process generated in such a step."""
        seconds, row = self.clock.seconds(), {"on_policy/share": self.steps / steps}
        if self.steps:
            row["on_policy/length"] = self.tokens / max(self.answers, 1)
            row["on_policy/seconds"] = seconds / self.steps
        self.steps = self.answers = self.tokens = 0
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "answers": self.answers, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.answers, self.tokens = (
            state[key] for key in ("steps", "answers", "tokens")
        )
