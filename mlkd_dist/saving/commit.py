"""Folders of files that are whole or not there: written aside, hashed, renamed, verified, removed.

    checkpoints/
      LATEST                   name of the last one committed, for people and scripts
      best-000030/             the best student so far, as a model folder, by its step
      step-000040/             one checkpoint: the number of optimizer steps that are done
        manifest.json          what it is, and size and hash of every other file
        rank-00000.safetensors ...

A folder without the ending `.partial` has been renamed in one go after all of its files were on
disk and in its manifest. So whatever a crash leaves behind, there are whole checkpoints and
rubbish, and the name tells which. The hash is against damage, not against people: nothing that is
read from here is code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST, LATEST, PARTIAL, REJECTED = "manifest.json", "LATEST", ".partial", ".rejected"
STEP, BEST = re.compile(r"step-(\d{6,})"), re.compile(r"best-(\d{6,})")
# At most one folder deep, and no name that leads elsewhere.
FILE = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
FORMAT = 1


class Rejected(Exception):
    """Why a checkpoint is not to be used."""


def reached(point: str) -> None:
    """Tests put something here that ends the process at a point of the protocol."""


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def best_name(step: int) -> str:
    return f"best-{step:06d}"


def begin(root: Path, name: str) -> Path:
    """An empty folder to write the files of a checkpoint to."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / (name + PARTIAL)
    remove(folder)
    folder.mkdir()
    reached("begun")
    return folder


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Put files on disk for good; name -> size and hash, for the manifest."""
    sealed = {}
    with ThreadPoolExecutor(1) as beside:
        for name in names:
            path = folder / name
            # The disk and the hash do not get in each other's way.
            hashed = beside.submit(file_hash, path)
            sync(path)
            reached("synced")
            sealed[name] = {"bytes": path.stat().st_size, "xxh3": hashed.result()}
    return sealed


def commit(root: Path, name: str, manifest: dict[str, Any]) -> None:
    """From here on the checkpoint is there; `manifest` has its sealed files under `files`. LATEST
    names those to go on from."""
    folder = root / (name + PARTIAL)
    write_whole(folder / MANIFEST, manifest_text(manifest))
    reached("manifest")
    for place in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        sync(place)
    reached("folders")
    remove(root / name)
    os.rename(folder, root / name)
    reached("renamed")
    sync(root)
    if STEP.fullmatch(name):
        write_whole(root / LATEST, name + "\n")
        reached("latest")
        sync(root)


def manifest_text(manifest: dict[str, Any]) -> str:
    """With its own hash on a second line: a changed byte anywhere shows."""
    line = json.dumps({"format": FORMAT, **manifest}, sort_keys=True)
    return f"{line}\n{xxhash.xxh3_128_hexdigest(line.encode())}\n"


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Raises Rejected."""
    try:
        text = (folder / name).read_bytes()
    except OSError as error:
        raise Rejected(f"{name} cannot be read ({error.strerror})") from error
    line, _, rest = text.partition(b"\n")
    if rest != xxhash.xxh3_128_hexdigest(line).encode() + b"\n":
        raise Rejected(f"{name} is damaged")
    manifest = json.loads(line)
    if manifest["format"] != FORMAT:
        raise Rejected(f"it has format {manifest['format']}, and this version reads {FORMAT}")
    return manifest


def check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """That the files of the manifest and no others are there, all of them plain files inside.
    Raises Rejected."""
    listed = set(manifest["files"])
    if strange := sorted(name for name in listed if not FILE.fullmatch(name)):
        raise Rejected(f"{MANIFEST} names {strange[0]!r}, which is no file of a checkpoint")
    there = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise Rejected(f"{path.relative_to(folder)} is no plain file")
        if path.is_file():
            there.add(path.relative_to(folder).as_posix())
    there.discard(MANIFEST)
    if missing := sorted(listed - there):
        raise Rejected(f"{missing[0]} is missing")
    if more := sorted(there - listed):
        raise Rejected(f"{more[0]} is not in its manifest")


def check_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """That these files are what was written. Raises Rejected."""
    for name in names:
        sealed, path = manifest["files"][name], folder / name
        try:
            if (size := path.stat().st_size) != sealed["bytes"]:
                raise Rejected(f"{name} has {size} bytes instead of {sealed['bytes']}")
            if file_hash(path) != sealed["xxh3"]:
                raise Rejected(f"{name} is damaged")
        except OSError as error:
            raise Rejected(f"{name} cannot be read ({error.strerror})") from error


def names(root: Path) -> list[str]:
    """Committed checkpoints, newest first; whether they are sound is another question."""
    if not root.is_dir():
        return []
    found = [path.name for path in root.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(name: str) -> int:
    return int(STEP.fullmatch(name)[1])


def latest(root: Path) -> str | None:
    """What LATEST says; None where there is no such file."""
    try:
        return (root / LATEST).read_bytes().decode(errors="replace").removesuffix("\n")
    except FileNotFoundError:
        return None


def reject(root: Path, name: str) -> None:
    """Out of the way of the one that will be written at the same step, and left for whoever wants
    to look."""
    remove(root / (name + REJECTED))
    os.rename(root / name, root / (name + REJECTED))


def prune(root: Path, keep: int, also: Iterable[str] = ()) -> None:
    """Remove all but the newest `keep`, those in `also` and what these start from, and older
    rubbish. The caller has verified the newest."""
    newest, *_ = found = names(root)
    kept = {*found[:keep], *also}
    kept |= {base for name in kept if (base := told(root / name).get("start"))}
    for path in sorted(root.iterdir()):
        name, _, ending = path.name.partition(".")
        if not STEP.fullmatch(name) or (not ending and name in kept):
            continue
        if f".{ending}" == REJECTED and step_of(name) > step_of(newest):
            continue
        if not ending:
            # A folder without an ending is whole, also while it is being removed.
            os.rename(path, path := root / (name + PARTIAL))
            reached("set aside")
        remove(path)
    reached("pruned")


def prune_best(root: Path, best: str) -> None:
    """Remove all best students but `best` and those that were it when a checkpoint was made: a run
    may go on from there."""
    known = {best, *((told(root / name).get("best") or {}).get("name") for name in names(root))}
    for path in sorted(root.iterdir()):
        name, _, ending = path.name.partition(".")
        if BEST.fullmatch(name) and (ending or name not in known):
            if not ending:
                os.rename(path, path := root / (name + PARTIAL))
            remove(path)


def go_back(root: Path, name: str, manifest: dict[str, Any]) -> None:
    """Make a checkpoint the newest again, with another manifest of the same files."""
    for newer in names(root):
        if step_of(newer) > step_of(name):
            os.rename(root / newer, root / (newer + PARTIAL))
            remove(root / (newer + PARTIAL))
    reached("gone back")
    # Written beside the folder, in which there is nothing that its manifest does not name.
    written = root / f"{name}.{MANIFEST}"
    write_whole(written, manifest_text(manifest))
    os.rename(written, root / name / MANIFEST)
    sync(root / name)
    reached("rewound")
    write_whole(root / LATEST, name + "\n")
    sync(root)


def told(folder: Path) -> dict[str, Any]:
    """What a manifest says; nothing where it cannot be read."""
    try:
        return read_manifest(folder)
    except Rejected:
        return {}


def writable(path: str | Path) -> bool:
    """Whether a file may be written there, in a folder that exists."""
    place = Path(path).absolute()
    return bool(str(path)) and not place.is_dir() and os.access(place.parent, os.W_OK)


def unfinished(run: Path, stages: int) -> bool:
    """Whether a run of so many stages is still to go on, as its newest checkpoint has it; one that
    is done may have none."""
    newest = next(iter(names(run / "checkpoints")), None)
    facts = told(run / "checkpoints" / newest) if newest else {}
    return bool(facts) and not (facts["stage_done"] and facts["stage"] == stages - 1)


def remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_whole(path: Path, text: str) -> None:
    """All of it or, after a crash, what was there before."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    sync(partial)
    os.rename(partial, path)


def sync(path: Path) -> None:
    """What the system holds back is on disk when this returns; of a folder, its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
