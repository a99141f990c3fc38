"""Which rows make up a step, and the micro-batches of them."""

import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from mlkd_dist.processes.signals import sent_when_parent_dies

# Seconds that a loader process may take for one micro-batch.
LOADER_TIMEOUT = 300


class Sampler:
    """Which rows one rank sees in each optimizer step: a pure function of seed, step and layout.

    The global batch of a step is the same run of the epoch's permutation however it is laid out
    over ranks and gradient accumulation. A slot that an epoch's last batch cannot fill holds -1.
    """

    def __init__(
        self,
        rows: int,
        micro_batch: int,
        grad_accum: int,
        rank: int,
        world: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        assert min(rows, micro_batch, grad_accum) > 0 and 0 <= rank < world
        self.rows, self.rank, self.seed, self.shuffle = rows, rank, seed, shuffle
        self.grad_accum = grad_accum
        self.layout = (grad_accum, world, micro_batch)
        self.global_batch = micro_batch * grad_accum * world
        self.steps_per_epoch = -(-rows // self.global_batch)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of this rank at a global step."""
        start = step % self.steps_per_epoch * self.global_batch
        found = self._permutation(self.epoch(step))[start : start + self.global_batch]
        slots = np.full(self.global_batch, -1, dtype=np.int64)
        slots[: len(found)] = found
        return slots.reshape(self.layout)[:, self.rank].tolist()

    def mark(self, step: int) -> int:
        """Of 32 bits; tells the global batch of a step from another, alike on every rank."""
        start = step % self.steps_per_epoch * self.global_batch
        rows = self._permutation(self.epoch(step))[start : start + self.global_batch]
        return zlib.crc32(np.array([self.rows, *self.layout, *rows], dtype=np.int64).tobytes())

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch])
            self._order = order.permutation(self.rows) if self.shuffle else np.arange(self.rows)
            self._epoch = epoch
        return self._order


def batches(
    dataset: datasets.Dataset,
    sampler: Sampler,
    start_step: int,
    stop_step: int,
    collate: Callable[[list[dict[str, Any]], list[bool]], Any],
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Any]]:
    """For each step, its collated micro-batches.

    A row carries "row" (its number) and "epoch". Where `keep` is False the slot is empty; row 0 is
    there to fill it.
    """
    loader = torch.utils.data.DataLoader(
        _Rows(dataset),
        batch_sampler=_Slots(sampler, start_step, stop_step),
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker if workers else None,
        # What collates is a function inside a function, which only a fork takes along; from Python
        # 3.14 on that is not what is chosen by itself.
        multiprocessing_context="fork" if workers else None,
        # A worker that is stuck is an error, not a wait without end.
        timeout=LOADER_TIMEOUT if workers else 0,
        # Else it draws from the global generator, and a resumed run sees other dropout.
        generator=torch.Generator(),
    )
    micro_batches = iter(loader)
    for _ in range(start_step, stop_step):
        yield [next(micro_batches) for _ in range(sampler.grad_accum)]


def _begin_worker(worker: int) -> None:
    """What is sent to every process of a run is for those that train. It ends with the one that it
    loads for: as a fork it holds that one's connections open, and the other processes would not
    notice that it died before PyTorch's own look after it, every 5 s."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sent_when_parent_dies(signal.SIGKILL)


@dataclass
class _Slots:
    sampler: Sampler
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch = self.sampler.epoch(step)
            for rows in self.sampler.step(step):
                yield [(row, epoch) for row in rows]


@dataclass
class _Rows:
    dataset: datasets.Dataset

    def __getitems__(self, slots: list[tuple[int, int]]) -> list[tuple[dict[str, Any], bool]]:
        rows = self.dataset.__getitems__([max(row, 0) for row, _ in slots])
        return [
            ({**found, "row": max(row, 0), "epoch": epoch}, row >= 0)
            for found, (row, epoch) in zip(rows, slots, strict=True)
        ]


@dataclass
class _Collate:
    collate: Callable[[list[dict[str, Any]], list[bool]], Any]

    def __call__(self, slots: list[tuple[dict[str, Any], bool]]) -> Any:
        return self.collate([row for row, _ in slots], [keep for _, keep in slots])
