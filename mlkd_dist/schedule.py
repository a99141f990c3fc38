"""How long a stage lasts, and its learning rate."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from transformers import get_scheduler

from mlkd_dist.config import FinetuneConfig, OptimConfig, StageConfig

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def total_steps(length: StageConfig | FinetuneConfig, steps_per_epoch: int) -> int:
    if length.steps is not None:
        return length.steps
    return max(1, math.ceil(length.epochs * steps_per_epoch))


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """A share of the stage if under 1, else a number of steps, at most the whole stage."""
    return min(steps, math.ceil(optim.warmup * steps) if optim.warmup < 1 else int(optim.warmup))


def learning_rate(optim: OptimConfig, steps: int) -> Callable[[Optimizer], object]:
    """For the engine: optimizer -> scheduler, linear or cosine to 0 or constant, after a linear
    warm-up."""
    return lambda optimizer: get_scheduler(
        NAMES[optim.schedule],
        optimizer,
        num_warmup_steps=warmup_steps(optim, steps),
        num_training_steps=steps,
    )
