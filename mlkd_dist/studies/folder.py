"""The folder of a study: whose it is, and which of its runs are finished."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from mlkd_dist.config import Config, UserError
from mlkd_dist.rules.settings import below, decisive, differences, flat, read_back
from mlkd_dist.saving.fingerprints import other_teacher
from mlkd_dist.studies.study import HEADER, Plan, Planned

# Settings that leave the export alone and change what the report says of it, and of its speed.
MEASURED = ("run.compare_maps", "task.generate", "batch.evaluation", "student.attention")


def check_folder(folder: Path) -> None:
    """UserError where there is something that is no study. Changes nothing."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"dir: {str(folder)!r} cannot be written, since {str(nearest)!r} is a file or "
            f"write-protected; choose another folder."
        )
    copy = folder / "study.yaml"
    ours = copy.is_file() and copy.read_bytes().startswith(HEADER.encode())
    if not ours and folder.exists() and {path.name for path in folder.iterdir()} - {"lock"}:
        raise UserError(f"dir: {str(folder)!r} holds files that are no study; choose another.")


@contextmanager
def alone(folder: Path) -> Iterator[IO[str]]:
    """While open, no other study works in this folder. Children keep the lock too, so it is held
    where one of them outlives this process; the system drops it with the last."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"dir: another `mlkd study`, or a run of it, is at work in {str(folder)!r}; wait "
                f"for it or end it."
            ) from error
        yield file


def finished(run: Planned, overwrite: bool) -> bool:
    """Whether this run is there already. UserError where a finished one has other settings, unless
    it may be replaced."""
    report = report_of(run.folder)
    if report is None or not (run.folder / "export").is_dir():
        return False
    changes = other_settings(run)
    if other_teacher(report, run.config.teacher.path):
        changes.append(f"what {run.config.teacher.path} holds")
    if changes and not overwrite:
        raise UserError(
            f"{run.folder}: this finished run has other settings ({changes[0]}"
            + (f", and {len(changes) - 1} more" if len(changes) > 1 else "")
            + "); choose another dir, or make such runs again with overwrite=true."
        )
    return not changes


def report_of(folder: Path) -> dict[str, Any] | None:
    """None where it is not there, or only a part of it."""
    try:
        found = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "student" in found else None


def other_settings(run: Planned) -> list[str]:
    theirs = read_back(run.folder / "config.yaml")
    if theirs is None:
        return ["config.yaml cannot be read"]
    return differences(*(settings(config) for config in (theirs, run.config)))


def settings(config: Config) -> dict[str, Any]:
    """All that its report depends on: the export, and how that is measured."""
    measured = {
        key: value
        for key, value in flat(asdict(config)).items()
        if any(below(key, name) for name in MEASURED)
    }
    return decisive(config) | measured


def save(asked: Plan) -> None:
    text = HEADER + OmegaConf.to_yaml(OmegaConf.create(asdict(asked.study)))
    (asked.folder / "study.yaml").write_text(text)
