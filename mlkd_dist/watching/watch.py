"""When a run saves and when it stops: signals, time, steps that went wrong. All processes decide
alike, in the all-reduce that each step begins with."""

import time
from collections import Counter

import torch
from torch import Tensor

from mlkd_dist.config import RunConfig
from mlkd_dist.processes.signals import SIGNALLED
from mlkd_dist.processes.world import World

STARTED = time.monotonic()
# Where the marks begin in what the processes add up.
MARKS = 3


class Stopped(Exception):
    """On request, after a checkpoint: exit code 75."""


class Diverged(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Desynchronised(Exception):
    """The processes are at different steps, or read different data."""


class Watch:
    """Of one run. A step begins with `begin_step` and `flags`, which the processes add up, and ends
    with `after_step`."""

    def __init__(self, settings: RunConfig, world: World):
        self.settings, self.world = settings, world
        self.saved = time.monotonic()
        self.skipped = self.skipped_in_a_row = 0
        self.stop = self.time_to_save = self.written = False
        self.mark = 0
        self._writes = False
        self._arrived: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def begin_step(self, step: int, batch: int, writes: bool = False) -> None:
        """Optimizer step number `step` of the run, from 0, with a batch that 32 bits tell; this
        process `writes` a checkpoint beside it."""
        self.mark, self._writes = (step << 31) | (batch >> 1), writes

    def flags(self) -> Tensor:  # [3 + world] int64: stop, save, write, the mark of each process
        limit, every = self.settings.time_limit, self.settings.checkpoint_minutes
        now = time.monotonic()
        late = limit is not None and now - STARTED > 60 * limit
        due = self.world.first and every is not None and now - self.saved > 60 * every
        flags = torch.zeros(MARKS + self.world.size, dtype=torch.int64)
        flags[0], flags[1], flags[2] = SIGNALLED.came or late, due, self._writes
        flags[MARKS + self.world.rank] = self.mark
        return flags.to(self.world.device, non_blocking=True)

    def sum_flags(self, flags: Tensor) -> None:
        """The sum over all processes has been asked for; it is read when the step is under way, so
        that the host does not wait for the device."""
        if flags.device.type == "cpu":
            self._arrived = flags.clone()
            # Nothing is to be waited for, so that the step is not made at all.
            self.compare(self._arrived[MARKS:].tolist())
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
        stop, due, writing, *marks = self._arrived.tolist()
        self.compare(marks)
        every = self.settings.checkpoint_every
        self.written = writing == 0
        self.stop = self.stop or stop > 0
        self.time_to_save = due > 0 or self.stop or (every is not None and done % every == 0)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise Diverged

    def compare(self, marks: list[int]) -> None:
        """Raises Desynchronised where the processes are not at the same step, with the same batch;
        on all of them alike."""
        (common, count), *others = Counter(marks).most_common()
        if not others:
            return
        odd = {rank: mark for rank, mark in enumerate(marks) if mark != common}
        told = "; ".join(f"process {rank} is at {shown(mark)}" for rank, mark in odd.items())
        raise Desynchronised(
            f"the processes are out of step: {told}; the other {count} at {shown(common)}. Nothing "
            f"of this step is kept; look for data or checkpoints that differ between machines, and "
            f"start again from the last checkpoint."
        )

    def has_saved(self) -> None:
        self.saved = time.monotonic()

    def begin_stage(self, skipped: int) -> None:
        """`skipped` of its steps were, before the run was interrupted."""
        self.skipped = skipped


def shown(mark: int) -> str:
    return f"step {(mark >> 31) + 1} with batch {mark & (2**31 - 1):08x}"
