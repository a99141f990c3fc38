"""What a cache of a teacher must be to serve a run, and whether one is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlkd_dist.cache.stored import AGAIN, BEGUN, Stored, row_keys, state_names
from mlkd_dist.config import Config, UserError
from mlkd_dist.inputs.batches import Sampler, batches
from mlkd_dist.models.model import read_config
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.processes.world import World
from mlkd_dist.rules.settings import differences, flat
from mlkd_dist.run import Run, on_first, source, told, user_errors
from mlkd_dist.saving import commit, verify
from mlkd_dist.saving.commit import Rejected
from mlkd_dist.saving.fingerprints import model, tokenizer
from mlkd_dist.schedule import total_steps
from mlkd_dist.student import starting_config
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Needs

# What the teacher's logits depend on, beside its weights, the tokenizer and the data.
SETTINGS = (
    "task.kind",
    "task.mask_probability",
    "task.stride",
    "data.max_length",
    "data.pack",
    "teacher.dtype",
    "teacher.cache.top_k",
)
VOCABULARY = "entries of the vocabulary"


def plan(run: Run) -> dict[str, Any]:
    """What a cache must be to serve this run. Read by the first process alone."""
    config, trust = run.config, run.config.trust_remote_code
    settings = flat({"task": vars(config.task), "data": vars(config.data)})
    settings |= {"teacher.dtype": config.teacher.dtype}
    settings |= {"teacher.cache.top_k": config.teacher.cache.top_k}
    found = {key: settings[key] for key in SETTINGS}
    if run.task.vocabulary:
        paths = config.teacher.path, source(config)
        sizes = [read_config(path, trust).get_text_config().vocab_size for path in paths]
        found[VOCABULARY] = min(sizes)
    return {
        "settings": found,
        "fingerprints": {
            "teacher.path": model(config.teacher.path, trust),
            "tokenizer": tokenizer(run.tokenizer),
        },
        "data": run.train._fingerprint,
        "rows": len(run.train),
        "vocabulary": found.get(VOCABULARY),
        "states": states(config),
        "temperatures": temperatures(config) if run.task.vocabulary else [],
        "epochs": epochs(run),
    }


def temperatures(config: Config) -> list[float]:
    """Those of the losses that read logits: the bucket of all others is a sum for each of them."""
    readers = (stage.losses.get("soft_labels") for stage in config.stages)
    return sorted({float(options["temperature"]) for options in readers if options is not None})


def states(config: Config) -> list[str]:
    """What the losses read of the teacher beside its logits, by their names in its files."""
    teacher = read_config(config.teacher.path, config.trust_remote_code)
    student, theirs = (
        Widths(found.hidden_size, found.num_hidden_layers)
        for found in (starting_config(config), teacher)
    )
    nowhere, needs = World(0, 1, 0, torch.device("meta")), Needs()
    for stage in config.stages:
        made = Objective(stage.losses, stage.layers, student, theirs, config.kernels, nowhere)
        needs = needs.union(made.needs(1))
    return state_names(needs)


def epochs(run: Run) -> int:
    """In how many ways a row is drawn while the teacher is read: 1 where it is always the same."""
    if not getattr(run.task, "redraws", False):
        return 1
    batch = run.config.batch
    sampler = Sampler(len(run.train), batch.micro_batch, batch.grad_accum, 0, run.world.size, 0)
    steps = [
        total_steps(stage, sampler.steps_per_epoch)
        for stage in run.config.stages
        if "soft_labels" in stage.losses
    ]
    return -(-max(steps) // sampler.steps_per_epoch)


def changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """How one plan differs from another, but for its data, temperatures, states and epochs."""
    return differences(theirs["settings"], ours["settings"]) + [
        f"what {key} holds"
        for key, mark in ours["fingerprints"].items()
        if theirs["fingerprints"].get(key) != mark
    ]


def require(config: Config) -> None:
    """UserError where a run is to read a cache that was never written to its end."""
    folder = Path(config.teacher.cache.dir)
    if not (folder / commit.MANIFEST).is_file():
        begun = (folder / BEGUN).is_file()
        raise UserError(
            f"teacher.cache.dir: {str(folder)!r} "
            f"{'is not finished' if begun else 'holds nothing of a teacher'}; {AGAIN} first, or "
            f"leave the teacher live with teacher.cache=null."
        )


def check_cache(run: Run) -> None:
    """That the cache is sound and has what this run asks for. All processes call this, and each
    hashes its share of the files."""
    folder = Path(run.config.teacher.cache.dir)
    try:
        manifest = on_first(run.world, lambda: commit.read_manifest(folder), Rejected)
        verify.check(folder.parent, run.world, folder.name, manifest)
    except Rejected as error:
        raise UserError(
            f"teacher.cache.dir: {str(folder)!r} cannot be used: {error}; {AGAIN}, which makes "
            f"anew what is missing or damaged."
        ) from error
    on_first(run.world, user_errors(lambda: check_plan(run, folder, manifest)))


def check_plan(run: Run, folder: Path, manifest: dict[str, Any]) -> None:
    theirs, ours = manifest["plan"], plan(run)
    changed = changes(theirs, ours)
    if missing := sorted(set(ours["temperatures"]) - set(theirs["temperatures"])):
        changed.append(f"soft_labels.temperature: {theirs['temperatures']} -> {missing}")
    if missing := sorted(set(ours["states"]) - set(theirs["states"])):
        changed.append(f"what the losses read: {', '.join(missing)} is not there")
    if ours["epochs"] > theirs["epochs"]:
        changed.append(
            f"epochs, each of which hides other tokens: {theirs['epochs']} -> {ours['epochs']}"
        )
    if not changed and ours["data"] != theirs["data"]:
        changed += other_rows(run, folder, ours["epochs"])
    if changed:
        raise UserError(
            f"teacher.cache.dir: {str(folder)!r} was made for something else ({told(changed)}); "
            f"undo the change, or name another folder and {AGAIN}."
        )


def other_rows(run: Run, folder: Path, epochs: int) -> list[str]:
    """That the data have rows which the cache does not know: they may be a part of its own."""
    stored, missing, first = Stored(folder, []), 0, None
    for epoch in range(epochs):
        order = Ranges([[(0, len(run.train), epoch)]], 64)
        for (batch,) in batches(run.train, order, 0, order.steps, collate(run)):
            for row, key in enumerate(row_keys(batch)):
                if key is not None and stored.place(key) is None:
                    missing += 1
                    first = first or batch.inputs["input_ids"][row, :8].tolist()
    if not missing:
        return []
    total = len(run.train) * epochs
    return [f"what data.train holds: {missing} of {total} rows are not there, such as {first}..."]


def collate(run: Run) -> Callable[[list[dict[str, Any]], list[bool]], Batch]:
    return lambda rows, keep: run.task.collate(rows, keep, run.tokenizer)


@dataclass
class Ranges:
    """In the place of a Sampler: pieces of the data in their order, (start, stop, epoch) or None
    for nothing; one list of them for each process, equally long."""

    pieces: list[list[tuple[int, int, int] | None]]
    batch: int
    rank: int = 0
    grad_accum = 1

    def __post_init__(self) -> None:
        longest = max((b - a for own in self.pieces for a, b, _ in filter(None, own)), default=0)
        self.steps_per_piece = -(-longest // self.batch)

    @property
    def steps(self) -> int:
        return self.steps_per_piece * len(self.pieces[self.rank])

    def step(self, step: int) -> list[list[int]]:
        index, part = divmod(step, self.steps_per_piece)
        start, stop, _ = self.pieces[self.rank][index] or (0, 0, 0)
        first = start + part * self.batch
        return [[row if row < stop else -1 for row in range(first, first + self.batch)]]

    def epoch(self, step: int) -> int:
        piece = self.pieces[self.rank][step // self.steps_per_piece]
        return piece[2] if piece else 0
