"""Which checkpoint a run may go on from: the newest one that is what was written."""

import sys
from pathlib import Path
from typing import Any

from mlkd_dist.config import UserError
from mlkd_dist.processes.world import World, broadcast_object, gather_objects
from mlkd_dist.run import on_first
from mlkd_dist.saving import commit
from mlkd_dist.saving.commit import Rejected


def newest(folder: Path, root: Path, world: World) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint in `root` that is sound, those that are not named on
    the terminal and set aside. None where none was ever committed; UserError where there were some
    and none is sound."""
    found = broadcast_object(commit.names(root) if world.first else None)
    rejected: dict[str, str] = {}
    for name in found:
        try:
            manifest = verified(root, world, name)
        except Rejected as error:
            rejected[name] = str(error)
            continue
        if world.first:
            set_aside(root, rejected)
        return manifest
    last = broadcast_object(commit.latest(root) if world.first else None)
    if found or last is not None:
        why = [f"{name}: {reason}" for name, reason in rejected.items()]
        raise UserError(
            f"run.dir: {str(folder)!r} has no sound checkpoint "
            f"({'; '.join(why) or f'{last!r}, the latest, is gone'}); bring one back, or start "
            f"again with run.resume=never run.overwrite=true."
        )
    return None


def set_aside(root: Path, rejected: dict[str, str]) -> None:
    for name, reason in rejected.items():
        print(
            f"mlkd: warning: checkpoint {name} is not used: {reason}; it is kept as "
            f"{name}{commit.REJECTED}",
            file=sys.stderr,
            flush=True,
        )
        commit.reject(root, name)


def verified(root: Path, world: World, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint that is sound, with the one that its stage started from.
    Raises Rejected on all processes."""

    def manifest_of(name: str) -> dict[str, Any]:
        return on_first(world, lambda: commit.read_manifest(root / name), Rejected)

    manifest = manifest_of(name)
    check(root, world, name, manifest)
    if start := manifest["start"]:
        try:
            check(root, world, start, manifest_of(start))
        except Rejected as error:
            raise Rejected(f"{start}, which its stage started from: {error}") from error
    return manifest


def check(root: Path, world: World, name: str, manifest: dict[str, Any]) -> None:
    """Raises Rejected on all processes where a file is not what the manifest says. The files are
    shared out over the processes."""
    folder = root / name
    on_first(world, lambda: commit.check_names(folder, manifest), Rejected)
    files = sorted(manifest["files"])[world.rank :: world.size]
    try:
        commit.check_files(folder, manifest, files)
        problem = None
    except Rejected as error:
        problem = str(error)
    if problems := [text for text in gather_objects(problem) if text is not None]:
        raise Rejected(problems[0])
