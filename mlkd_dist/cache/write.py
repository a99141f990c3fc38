"""`mlkd cache`: the teacher runs once over the training rows, and what it says is written for runs
that then need no teacher in memory; see stored.py for what is written.

The rows are cut into pieces, each of which becomes a shard: a file that is whole, by a name with
its hash, or not there. Who writes which piece, and in how many processes, does not matter; started
again, the command makes those that are missing. The manifest comes last.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlkd_dist.cache.plan import Ranges, changes, collate, plan
from mlkd_dist.cache.shard import Shard
from mlkd_dist.cache.stored import BEGUN, INDEX, SHORT_IDS, is_vector, shard_names, state_needs
from mlkd_dist.config import UserError
from mlkd_dist.engine import DTYPES
from mlkd_dist.inputs.batches import batches
from mlkd_dist.models.model import read_config
from mlkd_dist.processes.signals import say
from mlkd_dist.processes.world import gather_objects
from mlkd_dist.rules.settings import differences
from mlkd_dist.run import Run, alone, on_first, told, user_errors
from mlkd_dist.saving import commit
from mlkd_dist.saving.commit import MANIFEST, PARTIAL, Rejected
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs

# Of a shard, at most; and into how many at least the rows are cut, where they are so many.
SHARD_BYTES, SHARDS, SHARD_ROWS = 128 * 2**20, 512, 16
SHARD = re.compile(r"shard-(\d{5,})-([0-9a-f]{32})\.safetensors")

Piece = tuple[int, int, int]  # rows from, rows to, epoch


def write_cache(run: Run) -> None:
    """All processes call this."""
    world, folder = run.world, Path(run.config.teacher.cache.dir)
    with alone(folder.with_name(f"{folder.name}.lock"), world, "teacher.cache.dir"):
        pieces, missing, wanted = on_first(world, user_errors(lambda: begin(run, folder)))
        if missing:
            make_shards(run, folder, pieces, missing, wanted)
        if missing is not None:
            on_first(world, user_errors(lambda: finish(folder, pieces, wanted)))
        on_first(world, lambda: say(described(folder, missing)))


def begin(run: Run, folder: Path) -> tuple[list[Piece], list[int] | None, dict[str, Any]]:
    """All pieces, the numbers of those that are still to be made (None where nothing is left to be
    done at all), and the plan. Whatever is damaged is removed."""
    wanted = plan(run)
    pieces = pieces_of(run, wanted)
    there = made_for(folder)
    if there is None:
        start(folder, wanted)
        return pieces, list(range(len(pieces))), wanted
    refuse_another(folder, there, wanted)
    if is_whole(folder):
        return pieces, None, wanted
    (folder / MANIFEST).unlink(missing_ok=True)
    commit.write_whole(folder / BEGUN, commit.manifest_text({"plan": wanted}))
    done = sound_shards(folder)
    return pieces, [unit for unit in range(len(pieces)) if unit not in done], wanted


def made_for(folder: Path) -> dict[str, Any] | None:
    """The plan of the cache that is there, finished or not."""
    for name in (MANIFEST, BEGUN):
        try:
            return commit.read_manifest(folder, name)["plan"]
        except Rejected:
            continue
    return None


def start(folder: Path, wanted: dict[str, Any]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"teacher.cache.dir: {str(folder)!r} holds files that are no cache; choose another "
            f"folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    commit.write_whole(folder / BEGUN, commit.manifest_text({"plan": wanted}))


def refuse_another(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UserError where the folder holds a cache that was made for something else."""
    named = ("settings", "fingerprints")
    others = [{k: v for k, v in each.items() if k not in named} for each in (there, wanted)]
    if changed := changes(there, wanted) + differences(*others):
        raise UserError(
            f"teacher.cache.dir: {str(folder)!r} holds a cache that was made for something else "
            f"({told(changed)}); choose another folder, or remove it."
        )


def is_whole(folder: Path) -> bool:
    """Whether all files are there and sound; those that are not are removed."""
    try:
        manifest = commit.read_manifest(folder)
    except Rejected:
        return False
    whole = True
    for name in manifest["files"]:
        try:
            commit.check_files(folder, manifest, [name])
        except Rejected as error:
            say(f"teacher.cache.dir: {error}; it is made anew.")
            (folder / name).unlink(missing_ok=True)
            whole = False
    return whole


def sound_shards(folder: Path) -> set[int]:
    """The numbers of the shards that are what their names say; what else a crash or damage left of
    a cache is removed."""
    found = set()
    for path in folder.iterdir():
        match = SHARD.fullmatch(path.name)
        # Where two processes were killed between the same steps there may be two of one.
        if match and commit.file_hash(path) == match[2] and unit_of(path.name) not in found:
            found.add(unit_of(path.name))
        elif path.name.startswith(("shard-", INDEX)) or path.name.endswith(PARTIAL):
            path.unlink()
    return found


def unit_of(name: str) -> int:
    return int(SHARD.fullmatch(name)[1])


def pieces_of(run: Run, wanted: dict[str, Any]) -> list[Piece]:
    """The rows of all epochs, cut by their number and largest size alone."""
    rows, length = len(run.train), run.config.data.max_length
    config = read_config(run.config.teacher.path, run.config.trust_remote_code)
    if wanted["vocabulary"]:
        ids = 2 if wanted["vocabulary"] <= SHORT_IDS else 4
        k = min(run.config.teacher.cache.top_k, wanted["vocabulary"])
        size = length * (k * (2 + ids) + 4 * len(wanted["temperatures"]))
    else:
        size = (
            4 * config.num_labels * (length if run.config.task.kind == "question_answering" else 1)
        )
    for state in wanted["states"]:
        values = config.hidden_size * (1 if is_vector(state) else length)
        size += values * DTYPES[run.config.teacher.dtype].itemsize
    at_once = max(1, min(SHARD_BYTES // size, max(SHARD_ROWS, -(-rows // SHARDS))))
    return [
        (first, min(first + at_once, rows), epoch)
        for epoch in range(wanted["epochs"])
        for first in range(0, rows, at_once)
    ]


def make_shards(
    run: Run, folder: Path, pieces: list[Piece], missing: list[int], wanted: dict[str, Any]
) -> None:
    """The processes take pieces in turn. A teacher that is sharded runs in all of them at once, so
    each makes as many steps as the others, over nothing where it has no piece."""
    world, config = run.world, run.config
    rounds = -(-len(missing) // world.size)
    turns = [missing[rank :: world.size] for rank in range(world.size)]
    turns = [own + [None] * (rounds - len(own)) for own in turns]
    shared = [[None if unit is None else pieces[unit] for unit in own] for own in turns]
    order = Ranges(shared, config.batch.evaluation, world.rank)
    needs = Needs(frozenset({"head" if run.task.vocabulary else "logits"}))
    needs = needs.union(state_needs(wanted["states"]))
    settings, trust = config.teacher, config.trust_remote_code
    teacher = Teacher(settings.path, settings, run.task.model_class, needs, world, trust)
    made, shard = batches(run.train, order, 0, order.steps, collate(run)), Shard(wanted)
    for step, (batch,) in enumerate(made, 1):
        shard.add(batch, teacher(batch.to(world.device)))
        if step % order.steps_per_piece == 0:
            turn = step // order.steps_per_piece - 1
            unit = turns[world.rank][turn]
            if unit is None:
                agreed(nothing)
            else:
                agreed(partial(shard.save, folder, unit))
            shard = Shard(wanted)
            if world.first:
                done = min((turn + 1) * world.size, len(missing))
                say(f"{done} of {len(missing)} shards are written")
    teacher.close()


def nothing() -> None:
    pass


def agreed(work: Callable[[], None]) -> None:
    """UserError on all processes where `work` fails on one."""
    problem = None
    try:
        work()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problems := [text for text in gather_objects(problem) if text is not None]:
        raise UserError(
            f"teacher.cache.dir: it cannot be written ({problems[0]}); make room, and run `mlkd "
            f"cache` again, which goes on from here."
        )


def finish(folder: Path, pieces: list[Piece], wanted: dict[str, Any]) -> None:
    """The index and the manifest: from here on the cache is there."""
    names = shard_names(folder)
    assert [unit_of(name) for name in names] == list(range(len(pieces))), names
    keys, places, tokens, lost = [], [], 0, 0.0
    for number, name in enumerate(names):
        with safe_open(folder / name, "pt") as shard:
            keys.append(shard.get_tensor("keys").numpy())
            tokens += int(shard.get_tensor("starts")[-1])
            lost += float(shard.metadata()["outside"])
        rows = np.arange(len(keys[-1]), dtype=np.int32)
        places.append(np.stack([np.full_like(rows, number), rows], 1))
    write_index(folder, np.concatenate(keys), np.concatenate(places))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": SHARD.fullmatch(name)[2]}
        for name in names
    }
    size = sum(seal["bytes"] for seal in files.values())
    files |= commit.seal_files(folder, [INDEX, BEGUN])
    facts = {"plan": wanted, "files": files, "tokens": tokens, "bytes": size, "outside": lost}
    commit.reached("cache sealed")
    commit.write_whole(folder / MANIFEST, commit.manifest_text(facts))
    commit.sync(folder)


def write_index(folder: Path, keys: np.ndarray, places: np.ndarray) -> None:
    """Sorted; of rows that are there more than once, one."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, places = keys[order], places[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (keys[1:] != keys[:-1]).any(1)
    index = {"keys": keys[new], "places": places[new]}
    save_file({name: torch.from_numpy(x) for name, x in index.items()}, folder / INDEX)


def described(folder: Path, missing: list[int] | None) -> str:
    found = commit.read_manifest(folder)
    made, tokens = found["plan"], max(found["tokens"], 1)
    text = (
        f"{str(folder)!r} {'was there already' if missing is None else 'is written'}: "
        f"{made['rows']:,} rows, {found['tokens']:,} rows of logits, "
        f"{found['bytes'] / 1e6:,.1f} MB, {found['bytes'] / tokens:,.0f} bytes each"
    )
    if made["states"]:
        text += f", with {', '.join(made['states'])}"
    if not made["vocabulary"]:
        return f"{text}."
    k, temperature = made["settings"]["teacher.cache.top_k"], made["temperatures"][0]
    return (
        f"{text}; outside of the {k} largest lies a probability of {found['outside'] / tokens:.4f} "
        f"at temperature {temperature:g}."
    )
