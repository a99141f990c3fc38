"""The results file: what was measured, of which code, on which machine; and its table."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT

from faults.work import Figure, told
from mlkd_dist.processes.versions import versions
from mlkd_dist.saving.commit import write_whole


class Results:
    """Goes on with a file of the same code, and else begins anew."""

    def __init__(self, path: Path, quick: bool):
        self.path = path
        self.facts = {"commit": commit(path), "quick": quick, "machine": machine()}
        self.groups: dict[str, dict[str, Any]] = {}
        if path.exists():
            there = json.loads(path.read_text())
            if all(there[key] == self.facts[key] for key in ("commit", "quick")):
                self.groups = there["groups"]

    def add(self, name: str, figures: list[Figure], seconds: float) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        load = round(os.getloadavg()[0], 1)
        group = {"date": now, "seconds": round(seconds), "load": load, "figures": told(figures)}
        self.groups[name] = group
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.facts | {"groups": self.groups}, indent=1) + "\n")

    def figures(self) -> list[dict[str, Any]]:
        return [figure for group in self.groups.values() for figure in group["figures"]]

    def met(self) -> bool:
        """All figures that were measured."""
        return all(figure["met"] for figure in self.figures())


def commit(results: Path) -> str:
    """What is measured: a commit, and where it was changed since then a hash of the changes."""

    def git(*words: str) -> bytes:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, check=True, timeout=60
        ).stdout

    try:
        name = git("rev-parse", "--short=12", "HEAD").decode().strip()
        # The table in tests/faults/README.md and these results are written after they are measured.
        own = [":!tests/faults/results.json", ":!*.md"]
        changes = git("diff", "HEAD", "--", ".", *own)
    except (OSError, subprocess.CalledProcessError):
        return "no commit: this is no clone of a git repository"
    return f"{name} with changes {hashlib.sha256(changes).hexdigest()[:8]}" if changes else name


def machine() -> dict[str, Any]:
    return {
        "cpu": model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": versions(),
    }


def model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(results: Results) -> str:
    rows = [("figure", "wanted", "measured", "")]
    rows += [
        (f["name"], f["wanted"], f["measured"], "" if f["met"] else "MISSED")
        for f in results.figures()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    seconds = sum(group["seconds"] for group in results.groups.values())
    cases = sum(len(figure["cases"]) for figure in results.figures())
    return "\n".join(
        ["", *lines, "", f"{cases} cases in {seconds / 60:.0f} minutes: {results.path}"]
    )
