"""What a run shows while it trains: sums kept on the device, one flush per interval to the
terminal, to metrics.jsonl and to TensorBoard."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlkd_dist.engine import Engine
from mlkd_dist.processes.world import World, all_reduce
from mlkd_dist.saving.commit import write_whole


class Clock:
    """Seconds of parts of a step. On a GPU by events, so that nothing waits until the seconds are
    asked for."""

    def __init__(self, device: torch.device):
        self.events = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        if not self.events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.append((start, self.now()))

    def seconds(self) -> float:
        """Of all spans since the last call."""
        if self.events:
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            total = sum(end - start for start, end in self.spans)
        self.spans.clear()
        return total


@dataclass
class Line:
    """One line of the log, alike on all processes."""

    steps: int  # that it is of
    loss: float  # loss/total
    counted: list[str]  # the losses and layers that counted


class Metrics:
    """One stage of a run; steps are counted over all stages."""

    def __init__(
        self,
        folder: Path,
        world: World,
        stage: str,
        terms: list[str],
        weights: list[float],
        first_step: int,
        steps: int,
        log_every: int,
        backend: str,
        done: int = 0,
    ):
        """`done` of the stage's `steps` were made before the run was interrupted."""
        self.world, self.stage, self.terms, self.backend = world, stage, terms, backend
        self.first_step, self.steps, self.log_every = first_step, steps, log_every
        self.weights = torch.tensor(weights)
        self.teacher_clock = Clock(world.device)
        self.sums = torch.zeros(len(terms), device=world.device)
        self.samples = torch.zeros((), device=world.device)
        self.since, self.pending = time.perf_counter(), 0
        # What the last step has logged, if it did.
        self.line: Line | None = None
        # What counts now: terms, and layers as Objective.open_layers tells them.
        self.open_terms, self.open_layers = terms, {}
        # What else is to be logged of so many steps.
        self.more: list[Callable[[int], dict[str, float]]] = []
        self.terminal = sys.stderr.isatty()
        if world.first:
            self.file = (folder / "metrics.jsonl").open("a")
            self.board = SummaryWriter(str(folder / "tb"), purge_step=first_step + done)
            self.bar = tqdm(
                total=steps, initial=done, desc=stage, disable=not self.terminal, unit="step"
            )

    def state(self) -> dict[str, Any]:
        """What of this process has not been logged yet."""
        return {
            "sums": self.sums.tolist(),
            "samples": float(self.samples),
            "pending": self.pending,
            "seconds": time.perf_counter() - self.since,
        }

    def go_on(self, states: list[dict[str, Any]]) -> None:
        """From the states of all processes, which may have been more or fewer."""
        for state in states[self.world.rank :: self.world.size]:
            self.sums += torch.tensor(state["sums"], device=self.sums.device)
        self.samples.fill_(states[0]["samples"])
        self.pending = states[0]["pending"]
        self.since -= states[0]["seconds"]

    def add(self, shares: Tensor) -> None:  # [terms]
        """One micro-batch's share of every term."""
        self.sums += shares

    def step(
        self, engine: Engine, step: int, lr: float, samples: Tensor, flush: bool = False
    ) -> None:
        """Optimizer step number `step` of this stage, from 0, is done; `samples` of all processes
        counted in it. With `flush` it is logged, whatever the interval."""
        self.samples += samples
        self.pending += 1
        self.line = None
        if self.world.first:
            self.bar.update()
        if flush or (step + 1) % self.log_every == 0 or step + 1 == self.steps:
            self.flush(engine, step, lr)

    def flush(self, engine: Engine, step: int, lr: float) -> None:
        """Means over the steps since the last flush. The only place where the host waits for the
        device."""
        values = (all_reduce(self.sums) / self.pending).cpu()
        seconds = time.perf_counter() - self.since
        teacher = self.teacher_clock.seconds()
        norm, total = engine.get_global_grad_norm(), float((values * self.weights).sum())
        more = {key: value for of in self.more for key, value in of(self.pending).items()}
        counted = [*self.open_terms, *(key for key, open in self.open_layers.items() if open)]
        self.line = Line(self.pending, total, counted)
        if self.world.first:
            row = {"loss/total": total}
            row |= {
                f"loss/{name}": float(value)
                for name, value in zip(self.terms, values, strict=True)
                if name in self.open_terms
            }
            row |= self.open_layers | more
            row |= {
                "lr": lr,
                "grad_norm": None if norm is None else float(norm),
                "rows_per_s": float(self.samples) / seconds,
                "teacher_share": teacher / seconds,
                "peak_gib": peak_gib(self.world.device),
                "skipped_steps": engine.skipped_steps,
            }
            row = {key: value if finite(value) else None for key, value in row.items()}
            self.write(self.first_step + step, row)
            self.show(step, row)
        self.sums.zero_()
        self.samples.zero_()
        self.since, self.pending = time.perf_counter(), 0

    def validated(self, step: int, measured: dict[str, float], seconds: float) -> None:
        """What the held-out rows say of the student after step number `step` of this stage; the
        `seconds` that it took are not those of the steps."""
        self.since += seconds
        if not self.world.first:
            return
        row = {f"validation/{name}": value for name, value in measured.items()}
        row = {key: value if finite(value) else None for key, value in row.items()}
        self.write(self.first_step + step, row)
        told = "  ".join(
            f"{name} {'-' if row[f'validation/{name}'] is None else format(value, '.4g')}"
            for name, value in measured.items()
        )
        self.bar.write(f"{self.stage} {step + 1}/{self.steps}  validation: {told}")

    def write(self, step: int, row: dict[str, Any]) -> None:
        head = {"step": step, "stage": self.stage}
        self.file.write(json.dumps(head | row | {"backend": self.backend}) + "\n")
        self.file.flush()
        for tag, value in row.items():
            if value is not None:
                self.board.add_scalar(tag, value, step)

    def show(self, step: int, row: dict[str, Any]) -> None:
        losses = "  ".join(
            f"{key.removeprefix('loss/')} {'-' if row[key] is None else format(row[key], '.4g')}"
            for key in row
            if key.startswith("loss/")
        )
        if row["skipped_steps"]:
            losses += f"  skipped {row['skipped_steps']}"
        if opened := [key.removeprefix("open/") for key in self.open_layers if row[key]]:
            losses += f"  open: {' '.join(opened)}"
        if self.terminal:
            self.bar.set_postfix_str(losses)
            return
        rate = self.bar_rate()
        left = tqdm.format_interval((self.steps - step - 1) / rate)
        print(
            f"{self.stage} {step + 1}/{self.steps}  {losses}  {row['rows_per_s']:.0f} rows/s  "
            f"left {left}",
            flush=True,
        )

    def bar_rate(self) -> float:
        """Steps per second in this interval."""
        return self.pending / (time.perf_counter() - self.since)

    def close(self) -> None:
        if self.world.first:
            self.bar.close()
            self.file.close()
            self.board.close()


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def drop_logged(folder: Path, done: int, rewinds: list[dict[str, Any]]) -> None:
    """Remove from metrics.jsonl what steps after the first `done` have written: they are made
    again. The lines about `rewinds` are made anew, so that each is there once."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
            logged, rewound = row["step"], "rewind/to" in row
        except (ValueError, KeyError, TypeError):
            # The line that was being written when the run ended.
            continue
        if logged < done and not rewound:
            kept.append((logged, line))
    kept += [(row["step"], json.dumps(row) + "\n") for row in rewinds]
    kept.sort(key=lambda pair: pair[0])
    write_whole(path, "".join(line for _, line in kept))


def peak_gib(device: torch.device) -> float:
    """Largest memory so far: of the device's tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
