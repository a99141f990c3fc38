"""Where a measurement was made, and the CSV that it goes to."""

import csv
import datetime
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]
COLUMNS = (
    "date",
    "commit",
    "device",
    "threads",  # of a CPU
    "torch",
    "triton",
    "op",
    "case",
    "shape",
    "dtype",
    "backend",
    "direction",  # forward (without gradients), or forward+backward
    "ms_p20",
    "ms_p50",  # or "oom"
    "ms_p80",
    "extra_peak_mib",  # above what holds the inputs, or "oom"
    "allowed_mib",  # what it could take at most
    "value_error",  # against float64 at a smaller size of the same widths: |x - y| / |y|
    "gradient_error",
    "mma_tflops",  # of roofs.Work, whatever a backend really does
    "exps_per_s",
    "gb_per_s",
    "roof",  # what the work waits for
    "roof_share",
)
# What makes two rows the same measurement.
KEY = ("device", "threads", "op", "case", "shape", "dtype", "backend", "direction")


@functools.cache
def machine(device: str) -> Row:
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": "" if device == "cuda" else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if importlib.util.find_spec("triton") else "",
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """What is checked out, and where the sources differ from that, which ones they are."""
    named = os.environ.get("MLKD_COMMIT")
    if named:
        return named
    root = Path(__file__).parents[2]
    head = _git(root, "rev-parse", "--short", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "kernels/*.py")
    if head is None or changed:
        sources = (path.read_bytes() for path in sorted((root / "kernels").rglob("*.py")))
        return f"{head or ''}+{hashlib.sha1(b''.join(sources)).hexdigest()[:7]}"
    return head


def default_path(device: str) -> Path:
    """results/<device>-<date>.csv"""
    here = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    return FOLDER / f"{name}-{here['date']}.csv"


def read(*paths: Path) -> list[Row]:
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def append(path: Path, rows: Iterable[Row], columns: tuple[str, ...] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def latest(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The last of each measurement."""
    return {key(row): row for row in rows}


def of_this_commit(path: Path) -> list[Row]:
    """What need not be done again."""
    rows = read(path) if path.exists() else []
    return [row for row in rows if row["commit"] == commit()]


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # A copy without its history.
        return None
