"""When a run saves and when it stops: signals, time, steps that went wrong. All processes decide
alike, in the all-reduce that each step begins with."""

import time

import torch
from torch import Tensor

from mlkd_dist.config import RunConfig
from mlkd_dist.engine import World
from mlkd_dist.signals import SIGNALLED

STARTED = time.monotonic()


class Stopped(Exception):
    """On request, after a checkpoint: exit code 75."""


class Diverged(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Watch:
    """Of one run. A step begins with `flags`, which the processes add up, and ends with
    `after_step`."""

    def __init__(self, settings: RunConfig, world: World):
        self.settings, self.world = settings, world
        self.saved = time.monotonic()
        self.skipped = self.skipped_in_a_row = 0
        self.stop = self.time_to_save = False
        self._arrived: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def flags(self) -> Tensor:  # [2] int64: stop, save
        limit, every = self.settings.time_limit, self.settings.checkpoint_minutes
        now = time.monotonic()
        late = limit is not None and now - STARTED > 60 * limit
        due = self.world.first and every is not None and now - self.saved > 60 * every
        flags = torch.tensor([SIGNALLED.came or late, due], dtype=torch.int64)
        return flags.to(self.world.device, non_blocking=True)

    def sum_flags(self, flags: Tensor) -> None:
        """The sum over all processes has been asked for; it is read when the step is under way, so
        that the host does not wait for the device."""
        if flags.device.type == "cpu":
            self._arrived = flags.clone()
            return
        self._arrived = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        self._arrived.copy_(flags, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def after_step(self, done: int, skipped: int) -> None:
        """Optimizer step number `done` of the run, from 1, is done; `skipped` of this stage's were
        skipped. Raises Diverged."""
        if self._event is not None:
            self._event.synchronize()
        stop, due = self._arrived.tolist()
        every = self.settings.checkpoint_every
        self.stop = self.stop or stop > 0
        self.time_to_save = due > 0 or self.stop or (every is not None and done % every == 0)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise Diverged

    def has_saved(self) -> None:
        self.saved = time.monotonic()

    def begin_stage(self, skipped: int) -> None:
        """`skipped` of its steps were, before the run was interrupted."""
        self.skipped = skipped
