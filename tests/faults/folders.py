"""What happens to a run folder between two starts. Each says what it did."""

import shutil
from pathlib import Path
from random import Random

from damage import flipped

from mlkd_dist.saving import commit


def newest(run: Path) -> Path:
    root = run / "checkpoints"
    return root / commit.names(root)[0]


def shard(run: Path, seed: Random) -> Path:
    return seed.choice(sorted(newest(run).glob("rank-*")))


def flip(run: Path, seed: Random) -> str:
    return flip_bit(shard(run, seed), seed)


def flip_manifest(run: Path, seed: Random) -> str:
    return flip_bit(newest(run) / commit.MANIFEST, seed)


def flip_bit(path: Path, seed: Random) -> str:
    whole = path.read_bytes()
    place = seed.randrange(len(whole))
    path.write_bytes(flipped(whole, place, seed.randrange(8)))
    return f"a bit of byte {place} of {path.parent.name}/{path.name}"


def cut(run: Path, seed: Random) -> str:
    return cut_file(shard(run, seed), seed)


def cut_file(path: Path, seed: Random) -> str:
    size = path.stat().st_size
    lost = seed.randrange(1, size)
    with path.open("r+b") as file:
        file.truncate(size - lost)
    return f"{lost} of {size} bytes of {path.parent.name}/{path.name}"


def lose(run: Path, seed: Random) -> str:
    path = shard(run, seed)
    path.unlink()
    return f"{path.parent.name}/{path.name}"


def lose_manifest(run: Path, seed: Random) -> str:
    path = newest(run) / commit.MANIFEST
    path.unlink()
    return f"{path.parent.name}/{path.name}"


def lose_latest(run: Path, seed: Random) -> str:
    (run / "checkpoints" / commit.LATEST).unlink()
    return commit.LATEST


def point_nowhere(run: Path, seed: Random) -> str:
    path = run / "checkpoints" / commit.LATEST
    path.write_text("step-999999\n")
    return f"{path.name} says step-999999"


def litter(run: Path, seed: Random) -> str:
    """Older, of the same step as the next one, and newer than all."""
    root, made = run / "checkpoints", []
    for step in (1, 8, 9, 99):
        for ending in (commit.PARTIAL, commit.REJECTED):
            folder = root / (commit.step_name(step) + ending)
            folder.mkdir(exist_ok=True)
            (folder / "rank-00000.safetensors").write_bytes(seed.randbytes(99))
            made.append(folder.name)
    (run / ("config.yaml" + commit.PARTIAL)).write_text("run: {")
    (run / "export.partial").mkdir(exist_ok=True)
    return ", ".join(made)


def tear_log(run: Path, seed: Random) -> str:
    """As if it had been killed while it wrote one more line."""
    path = run / "metrics.jsonl"
    text = path.read_text()
    last = text.splitlines()[-1]
    half = last[: seed.randrange(1, len(last))]
    path.write_text(text + half)
    return f"{path.name}: {half}"


def tear_events(run: Path, seed: Random) -> str:
    """As if it had been killed while it wrote one more event."""
    (path, *_) = sorted((run / "tb").glob("events*"))
    whole = path.read_bytes()
    # A record begins with its length.
    half = whole[: seed.randrange(9, 24)]
    path.write_bytes(whole + half)
    return f"{len(half)} bytes after the last whole event"


def halve_export(run: Path, seed: Random) -> str:
    path = seed.choice(sorted((run / "export").glob("*.*")))
    path.unlink()
    shutil.move(run / "export", run / "export.partial")
    return f"export.partial without {path.name}"


def cut_cache(run: Path, seed: Random) -> str:
    path = seed.choice(sorted((run.parent / "cache").rglob("*.arrow")))
    return cut_file(path, seed)
