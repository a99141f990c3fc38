"""`mlkd export`: the student of a run in a folder of its own, read back before it is done."""

import json
import os
import shutil
from pathlib import Path

from mlkd_dist.config import HEADER, UserError
from mlkd_dist.rules.settings import read_back
from mlkd_dist.saving.commit import unfinished


def export(run: str, out: str | None, dense: bool) -> str:
    """What was done, in words. The run's export is copied to `out`; with `dense` it is merged into
    an ordinary folder, by default `<run>/export-dense`. Without either it is only read."""
    source = exported(run)
    factorised = "mlkd_low_rank" in json.loads((source / "config.json").read_text())
    if dense and not factorised:
        raise UserError(
            f"--dense: the student of {run!r} has no factors to merge (student.low_rank made "
            f"none); leave --dense out."
        )
    if out is None and not dense:
        return told(source)
    target = fresh(out or f"{run}/export-dense", source)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if dense:
            told(source)
            merged(source, partial)
        else:
            shutil.copytree(source, partial)
        told(partial)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return told(target)


def merged(source: Path, out: Path) -> None:
    from mlkd_dist.low_rank import load_student, merge

    factors = shutil.ignore_patterns("*.safetensors*", "README.md")
    shutil.copytree(source, out, ignore=factors)
    merge(load_student(source)).save_pretrained(out)


def told(folder: Path) -> str:
    """What lies there and how to load it, once it was loaded."""
    # Heavy; what a person got wrong is known before.
    from mlkd_dist.low_rank import load_student, ranks_of

    try:
        student = load_student(folder)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{str(folder)!r} cannot be loaded: {reason}") from error
    name = student.config.architectures[0]
    loader = "mlkd_dist.load_student"
    if not ranks_of(student.config):
        loader = f"transformers.{name}.from_pretrained"
    numbers = sum(p.numel() for p in student.parameters())
    return f"{name}, {numbers:,} parameters; load it with {loader}({str(folder)!r})"


def exported(run: str) -> Path:
    """The export of a run; UserError where there is none."""
    folder, made = Path(run), Path(run) / "config.yaml"
    if not made.is_file() or not made.read_bytes().startswith(HEADER.encode()):
        raise UserError(f"{run!r} is no run folder; give the run.dir of a `mlkd distill`.")
    if not (folder / "export" / "config.json").is_file():
        raise UserError(f"{run!r} has no export yet; run `mlkd distill` to its end first.")
    config = read_back(made)
    if config is not None and unfinished(folder, len(config.stages)):
        raise UserError(
            f"{run!r} is not done, and its export is that of an earlier stage; run `mlkd distill` "
            f"to its end first."
        )
    return folder / "export"


def fresh(out: str, source: Path) -> Path:
    """UserError for a folder that holds something, or cannot be had."""
    target = Path(os.path.expanduser(out))
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out!r} is the export itself or lies in it; choose another folder.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{out!r} is there already; choose another folder, or remove it.")
    nearest = next(path for path in (target, *target.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{out!r} cannot be written, since {str(nearest)!r} cannot be.")
    return target
