"""What a run saves while it goes on, and how it goes on from there; the exported student.

A checkpoint within a stage holds what trains: fp32 weights, Adam's moments, counters, random
numbers. One at the end of a stage holds what the next stage starts with: the exported student and
its projections. The best student of a run that evaluates is kept beside them as it would be
exported. Nothing in any of them is code, and the teacher is in none.
"""

import copy
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlkd_dist.config import UserError
from mlkd_dist.engine import Engine, whole_weights
from mlkd_dist.low_rank import save
from mlkd_dist.models.tap import taken_inputs
from mlkd_dist.processes.signals import say
from mlkd_dist.processes.world import World, broadcast_object, gather_objects
from mlkd_dist.run import on_first
from mlkd_dist.saving import commit, verify
from mlkd_dist.saving.commit import Rejected
from mlkd_dist.saving.shards import own_shard, read_shards, shapes

PROJECTIONS = "projections.safetensors"


class NotSaved(Exception):
    """Raised on all processes alike; what was saved before is untouched."""


class Stateful(Protocol):
    """Of a stage, the same on all processes; its state is made of what JSON knows."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Position:
    """Where a run is: before step `step` of stage `stage`."""

    stage: int = 0
    step: int = 0
    first_step: int = 0
    """Steps of all stages before this one."""
    start: str | None = None
    """The checkpoint at the end of the stage before; None in the first stage."""
    name: str | None = None
    """The checkpoint of this very place; None at the start of a stage."""
    skip: int = 0
    """Steps of this stage whose data the run went back to be without: those of step k are the data
    of k + skip."""

    @property
    def done(self) -> int:
        return self.first_step + self.step


@dataclass
class Writing:
    """A checkpoint whose files are being written while the run trains on."""

    name: str
    facts: dict[str, Any]
    sealed: Future[dict[str, Any]]
    """Of the files of this process."""


@dataclass
class Checkpoints:
    """Those of one run. All processes call every method."""

    folder: Path
    world: World
    keep: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What every manifest says of the run: its settings, fingerprints, versions."""
    exports: str = "last"
    """`run.export`."""
    best: dict[str, Any] | None = None
    """name, step, measure and value of the best student of the stage that is running."""
    every: int | None = None
    """Steps between those that the run may go back to; None where it does not."""
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    """How often it went back: stage, to, spike, skipped (steps), loss and usual."""
    beside: ThreadPoolExecutor | None = None
    """Writes within a stage while the run trains on; None: training waits."""
    writing: Writing | None = None
    """What it is at, on all processes alike."""

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def save(
        self, at: Position, engine: Engine, metrics: list[Any], kept: dict[str, Stateful]
    ) -> None:
        """Commit a stage after `at.step` steps, or begin to; `metrics` are of each process."""
        rank_file = f"rank-{self.world.rank:05d}.safetensors"
        scheduler = engine.lr_scheduler
        facts = {
            "stage_done": False,
            "shapes": shapes(engine),
            "layout": layout(engine, self.world),
            "schedule_step": scheduler.last_epoch,
            "skipped_steps": engine.skipped_steps,
            "metrics": metrics,
            "state": {key: thing.state_dict() for key, thing in kept.items()},
        }

        write_shard = own_shard(engine, self.world, copied=self.beside is not None)

        def write(folder: Path) -> list[str]:
            write_shard(folder / rank_file)
            return [rank_file]

        if self.beside is None:
            self.commit(at, write, facts)
            return
        assert self.writing is None
        name = commit.step_name(at.done)
        partial = self.begin(name)
        sealed = self.beside.submit(sealed_files, partial, write)
        self.writing = Writing(name, self.told(at, facts), sealed)

    @property
    def written(self) -> bool:
        """Whether this process has nothing to write any more."""
        return self.writing is None or self.writing.sealed.done()

    def settle(self) -> None:
        """Commit what is being written, if anything is."""
        if (writing := self.writing) is None:
            return
        self.writing = None
        self.finish(writing.name, writing.sealed.result, writing.facts)
        self.agreed(self.prune if self.world.first else nothing)

    def save_stage_end(
        self,
        at: Position,
        model: PreTrainedModel,
        projections: nn.ModuleDict,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Position:
        """Commit the trained student of a stage, and make it the run's export; returns where the
        next stage starts."""
        weights, maps = whole_weights(model), whole_weights(projections)

        def write(folder: Path) -> list[str]:
            if not self.world.first:
                return []
            export(model, weights, tokenizer, folder / "export")
            save_file(maps, folder / PROJECTIONS)
            return files_below(folder)

        name = self.commit(at, write, {"stage_done": True})
        self.publish(name)
        return Position(at.stage + 1, 0, at.done, start=name)

    def save_best(
        self, found: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Keep the student as it is now, which `found` tells of, as the best so far."""
        weights = whole_weights(model)

        def write(folder: Path) -> list[str]:
            if not self.world.first:
                return []
            export(model, weights, tokenizer, folder / "export")
            return files_below(folder)

        name = commit.best_name(found["step"])
        self.seal(name, write, found | {"start": None})
        self.best = {"name": name, **found}
        self.agreed((lambda: commit.prune_best(self.root, name)) if self.world.first else nothing)

    def sound(self, best: dict[str, Any] | None) -> dict[str, Any] | None:
        """The best student that a manifest names, if it is what was written."""
        if best is None:
            return None
        try:
            verify.verified(self.root, self.world, best["name"])
        except Rejected as error:
            say(f"warning: {best['name']}, the best student so far, is not used: {error}.")
            return None
        return best

    def publish(self, name: str) -> None:
        """Make the student of a stage that is done the run's export: its last or its best one.
        Where no best one was kept, as in every stage but the last, it is the last."""
        if self.exports == "best":
            made = on_first(self.world, lambda: commit.told(self.root / name))
            best = self.sound(made.get("best"))
            name = name if best is None else best["name"]

        def swap() -> None:
            partial, folder = self.folder / "export.partial", self.folder / "export"
            commit.remove(partial)
            shutil.copytree(self.root / name / "export", partial)
            commit.reached("copied")
            commit.remove(folder)
            commit.reached("export removed")
            os.rename(partial, folder)
            commit.reached("published")

        self.agreed(swap if self.world.first else nothing)

    def commit(
        self, at: Position, write: Callable[[Path], list[str]], facts: dict[str, Any]
    ) -> str:
        """A checkpoint at `at`, and which one is the best so far."""
        name = commit.step_name(at.done)
        self.seal(name, write, self.told(at, facts))
        self.agreed(self.prune if self.world.first else nothing)
        return name

    def told(self, at: Position, facts: dict[str, Any]) -> dict[str, Any]:
        """What a manifest says of a checkpoint at `at`, as things are now."""
        return facts | {
            "stage": at.stage,
            "stage_step": at.step,
            "step": at.done,
            # What is whole in itself needs no other.
            "start": None if facts["stage_done"] else at.start,
            "best": self.best,
            "rewinds": self.rewinds,
        }

    def seal(self, name: str, write: Callable[[Path], list[str]], facts: dict[str, Any]) -> None:
        """Commit what `write` makes: it puts the files of this process into a folder and returns
        their names. Raises NotSaved on all processes where one of them fails."""
        partial = self.begin(name)
        self.finish(name, lambda: sealed_files(partial, write), facts)

    def begin(self, name: str) -> Path:
        """Where its files belong, on all processes."""
        self.agreed((lambda: commit.begin(self.root, name)) if self.world.first else nothing)
        return self.root / (name + commit.PARTIAL)

    def finish(
        self, name: str, sealed: Callable[[], dict[str, Any]], facts: dict[str, Any]
    ) -> None:
        """Commit what is whole on disk; `sealed` tells what this process has put there."""
        try:
            files = {file: seal for found in self.agreed(sealed) for file, seal in found.items()}
            manifest = self.facts | facts | {"files": files}
            self.agreed(
                (lambda: commit.commit(self.root, name, manifest)) if self.world.first else nothing
            )
        except NotSaved as error:
            if self.world.first:
                shutil.rmtree(self.root / (name + commit.PARTIAL), ignore_errors=True)
            raise NotSaved(f"{name} cannot be written: {error}") from error

    def prune(self) -> None:
        """Remove what is old, now that a newer checkpoint verifies."""
        # The newest of them may lie within the line of the log that shows a spike.
        regular = [name for name in commit.names(self.root) if self.is_regular(name)]
        commit.prune(self.root, self.keep, regular[:2])
        commit.prune_best(self.root, self.best["name"] if self.best else "")

    def is_regular(self, name: str) -> bool:
        """Whether a run that is never stopped makes it, too."""
        return self.every is not None and commit.step_of(name) % self.every == 0

    def regular(self, at: Position, latest: int) -> list[str]:
        """Those of the stage of `at` that the run may go back to, the newest first, up to the one
        after `latest` steps; that at the end of the stage before is one."""
        found = broadcast_object(commit.names(self.root) if self.world.first else None)
        return [
            name
            for name in found
            if at.first_step <= commit.step_of(name) <= latest
            and (self.is_regular(name) or commit.step_of(name) == at.first_step)
        ]

    def go_back(self, name: str, manifest: dict[str, Any], rewind: dict[str, Any]) -> Position:
        """Make this checkpoint the newest again, one that knows of this and all earlier rewinds;
        returns where the run goes on."""
        self.rewinds, self.best = [*self.rewinds, rewind], manifest.get("best")
        manifest = manifest | {"rewinds": self.rewinds}

        def write() -> None:
            commit.go_back(self.root, name, manifest)
            commit.prune_best(self.root, self.best["name"] if self.best else "")

        self.agreed(write if self.world.first else nothing)
        return position(manifest)

    def agreed(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on every process. Where it fails on one, NotSaved on all."""
        try:
            outcome = ("done", work())
        except (OSError, SafetensorError, Rejected) as error:
            outcome = ("error", f"process {self.world.rank}: {error}")
        outcomes = gather_objects(outcome)
        if errors := [text for kind, text in outcomes if kind == "error"]:
            raise NotSaved("; ".join(errors))
        return [value for _, value in outcomes]

    def newest(self) -> dict[str, Any] | None:
        """See verify.newest."""
        return verify.newest(self.folder, self.root, self.world)

    def load(self, at: Position, engine: Engine, kept: dict[str, Stateful]) -> list[Any]:
        """Put what `save` saved into a new engine of any layout; returns the metrics of each of the
        processes that saved."""
        folder = self.root / at.name
        manifest = commit.read_manifest(folder)
        ours, theirs = shapes(engine), manifest["shapes"]
        if ours != theirs:
            different = sorted(
                n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)
            )
            raise UserError(
                f"run.dir: checkpoint {at.name} is of another student: {different[0]} is "
                f"{theirs.get(different[0])} there and {ours.get(different[0])} here; undo the "
                f"change, or choose another folder."
            )
        files = sorted(name for name in manifest["files"] if name.startswith("rank-"))
        same = manifest["layout"] == layout(engine, self.world)
        read_shards(engine, self.world, folder, files, same)
        engine.skipped_steps = manifest["skipped_steps"]
        engine.global_steps = manifest["stage_step"]
        set_schedule(engine, manifest["schedule_step"])
        for key, thing in kept.items():
            # With run.resume=changed it may be new.
            if key in manifest["state"]:
                thing.load_state_dict(manifest["state"][key])
        return manifest["metrics"]


def nothing() -> None:
    pass


def sealed_files(folder: Path, write: Callable[[Path], list[str]]) -> dict[str, Any]:
    """Those that `write` puts there, on disk for good and read back."""
    sealed = commit.seal_files(folder, write(folder))
    commit.check_files(folder, {"files": sealed}, sealed)
    return sealed


def position(manifest: dict[str, Any]) -> Position:
    """Where a run goes on from this checkpoint."""
    name, done = commit.step_name(manifest["step"]), manifest["stage_done"]
    stage = manifest["stage"] + done
    rewinds = manifest.get("rewinds", [])
    skip = sum(rewind["skipped"] for rewind in rewinds if rewind["stage"] == stage)
    if done:
        return Position(stage, 0, manifest["step"], start=name, skip=skip)
    first_step = manifest["step"] - manifest["stage_step"]
    return Position(stage, manifest["stage_step"], first_step, manifest["start"], name, skip)


def layout(engine: Engine, world: World) -> list[int]:
    return [world.size, engine.zero_optimization_stage()]


def set_schedule(engine: Engine, step: int) -> None:
    """The schedule is a function of the number of its steps."""
    scheduler = engine.lr_scheduler
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [
        base * rule(step)
        for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def export(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """The trained weights for `AutoModel*.from_pretrained(folder)`, beside a tokenizer that gives
    what this model takes, where that of training may give what its teacher takes too."""
    save(model, folder, weights)
    own = copy.copy(tokenizer)
    own.model_input_names = [n for n in tokenizer.model_input_names if n in taken_inputs(model)]
    own.init_kwargs = tokenizer.init_kwargs | {"model_input_names": own.model_input_names}
    own.save_pretrained(folder)


def files_below(folder: Path) -> list[str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in found]


def load_projections(projections: nn.ModuleDict, path: Path) -> None:
    """Those that an earlier stage trained under the same name and shape, before the engine shards
    them."""
    ours = projections.state_dict()
    trained = {n: w for n, w in load_file(path).items() if n in ours and ours[n].shape == w.shape}
    projections.load_state_dict(ours | trained)
