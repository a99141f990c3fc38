"""How long a stage lasts, its learning rate, and when the losses of which layers count."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import get_scheduler

from mlkd_dist.config import FinetuneConfig, OpenConfig, OptimConfig, StageConfig, UserError

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def total_steps(length: StageConfig | FinetuneConfig, steps_per_epoch: int) -> int:
    if length.steps is not None:
        return length.steps
    return max(1, math.ceil(length.epochs * steps_per_epoch))


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """A share of the stage if under 1, else a number of steps; at most all but the last, since the
    first of a warm-up has a rate of 0."""
    # 0.07 of 100 is 7 and a rounding error.
    share = math.ceil(round(optim.warmup * steps, 6))
    return min(steps - 1, share if optim.warmup < 1 else int(optim.warmup))


def learning_rate(optim: OptimConfig, steps: int) -> Callable[[Optimizer], object]:
    """For the engine: optimizer -> scheduler, linear or cosine to 0 or constant, after a linear
    warm-up."""
    return lambda optimizer: get_scheduler(
        NAMES[optim.schedule],
        optimizer,
        num_warmup_steps=warmup_steps(optim, steps),
        num_training_steps=steps,
    )


class Opening:
    """The layers whose losses count, from the bottom up: PID and SID of Aguilar et al. 2020 (arXiv
    1910.03723).

    A stage has a phase for each of its student layers and a last one, the classifier's, for the
    losses without layers. In the phase of layer k pid counts the losses of k, sid those of all
    layers up to k. A phase ends when the mean cosine loss of its open layers falls below the
    threshold, or when its part of the steps is over, which is counted from the beginning of the
    stage: time that one layer saves goes to the next. Our reading: the mean, taken over the steps
    since the last look, every `check_every` steps; equal parts for all layers; no new warm-up.

    All that it goes by is the same on every process, so that all open the same layers.
    """

    def __init__(self, rule: OpenConfig, layers: list[int], steps: int):
        self.rule, self.layers = rule, layers
        last = 1 / (len(layers) + 1) if rule.classifier is None else rule.classifier
        self.ends = [round(steps * (1 - last) * (k + 1) / len(layers)) for k in range(len(layers))]
        lengths = [b - a for a, b in zip([0, *self.ends], [*self.ends, steps], strict=True)]
        if min(lengths) < 1:
            raise ValueError(
                f"open: {steps} steps are too few for {len(layers)} layers and the classifier's "
                f"share of {last:.3g}, which need a step each; give more steps, or another share."
            )
        self.phase = 0
        # Sum and number of the cosine losses since the last look.
        self.total: Tensor | float = 0.0
        self.count = 0

    @property
    def open(self) -> list[int]:
        """Student layers whose losses count now."""
        if self.predicts_only:
            return []
        first = self.phase if self.rule.rule == "pid" else 0
        return self.layers[first : self.phase + 1]

    @property
    def predicts_only(self) -> bool:
        return self.phase == len(self.layers)

    @property
    def predicts(self) -> bool:
        """Whether losses without layers count now."""
        return self.predicts_only or self.rule.keep_soft_labels

    @property
    def watches(self) -> bool:
        """Whether the cosine loss may end this phase."""
        return self.rule.threshold > 0 and not self.predicts_only

    def end_step(self, step: int, cosine: Tensor | None) -> bool:
        """Step number `step` of the stage is done; `cosine` is its mean cosine loss per open layer,
        of all processes, None where nobody watches it. True where another phase begins."""
        if self.predicts_only:
            return False
        if cosine is not None:
            self.total, self.count = self.total + cosine, self.count + 1
        over = step + 1 >= self.ends[self.phase]
        if cosine is not None and (step + 1) % self.rule.check_every == 0:
            over = float(self.total) / self.count < self.rule.threshold or over
            self.total, self.count = 0.0, 0
        if over:
            self.phase += 1
            self.total, self.count = 0.0, 0
        return over

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "total": float(self.total), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # With `resume: changed` there may be fewer layers than it was saved with.
        self.phase = min(state["phase"], len(self.layers))
        self.total, self.count = state["total"], state["count"]


def opening(where: str, stage: StageConfig, layers: list[int], steps: int) -> Opening | None:
    """Of a stage called `where` in the config with losses on these student layers; None where all
    count at every step."""
    if stage.open is None or stage.open.rule == "all":
        return None
    try:
        return Opening(stage.open, layers, steps)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from error
