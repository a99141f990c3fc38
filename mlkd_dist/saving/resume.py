"""Opening a run folder: a new run, or one that goes on from its newest sound checkpoint."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlkd_dist import config as configs
from mlkd_dist.checkpoint import Checkpoints, Position, position
from mlkd_dist.config import UserError
from mlkd_dist.metrics import drop_logged
from mlkd_dist.processes.versions import versions
from mlkd_dist.rules.settings import differences, global_batch, mathematics
from mlkd_dist.run import UNFINISHED, Run, make_folder, on_first, told, user_errors
from mlkd_dist.saving.fingerprints import fingerprints
from mlkd_dist.watching.spikes import rows


def open_run(run: Run, found: str) -> tuple[str, Checkpoints, Position]:
    """The model folder that the run starts from, its checkpoints, and where it goes on; `found` is
    what `run.standing` said of its folder. All processes call this."""
    settings = run.config.run
    checkpoints = Checkpoints(
        run.folder, run.world, settings.keep_checkpoints, exports=settings.export
    )
    checkpoints.every = settings.checkpoint_every if settings.rewind else None
    checkpoints.beside = ThreadPoolExecutor(1) if settings.save_in_background else None
    manifest = checkpoints.newest() if found == UNFINISHED else None
    student_path = run.config.student.path or str(run.folder / "student")
    if manifest is not None:
        checkpoints.facts, changed = on_first(
            run.world, user_errors(lambda: compared(run, student_path, manifest))
        )
        if changed and run.config.run.resume != "changed":
            if not run.config.run.overwrite:
                raise UserError(refusal(run, manifest, changed))
            manifest = None
    if manifest is None:
        if found == UNFINISHED:
            say(run, "an earlier run is there that cannot be gone on with; starting from step 0.")
        student_path = make_folder(run.config, run.world)
        checkpoints.facts = on_first(run.world, user_errors(lambda: facts(run, student_path)))
        return student_path, checkpoints, Position()
    at = position(manifest)
    checkpoints.best = checkpoints.sound(manifest.get("best"))
    checkpoints.rewinds = manifest.get("rewinds", [])
    say(run, f"resuming from step {at.done}, stage {at.stage + 1} of {len(run.config.stages)}.")
    go_on(run, checkpoints, at)
    return student_path, checkpoints, at


def go_on(run: Run, checkpoints: Checkpoints, at: Position) -> None:
    """Bring the rest of the folder to where the checkpoint is."""

    def write() -> None:
        configs.save(run.config, run.folder / "config.yaml")
        drop_logged(run.folder, at.done, rows(checkpoints.rewinds, run.config.stages))

    on_first(run.world, user_errors(write))
    if at.start is not None:
        checkpoints.publish(at.start)


def compared(
    run: Run, student_path: str, manifest: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What is so now, and how it differs from a checkpoint."""
    if not Path(student_path).exists() and run.config.student.path is None:
        raise UserError(
            f"run.dir: {str(run.folder)!r} has lost its folder 'student'; bring it back, or start "
            f"again with run.resume=never run.overwrite=true."
        )
    now = facts(run, student_path)
    changed = differences(manifest["settings"], now["settings"])
    changed += [
        f"what {key} holds"
        for key, mark in now["fingerprints"].items()
        if manifest["fingerprints"].get(key) != mark
    ]
    return now, changed


def facts(run: Run, student_path: str) -> dict[str, Any]:
    """For the manifest of every checkpoint."""
    config = run.config
    return {
        "settings": mathematics(config) | global_batch(config, run.world.size),
        "fingerprints": fingerprints(run, student_path),
        "versions": versions(),
    }


def refusal(run: Run, manifest: dict[str, Any], changed: list[str]) -> str:
    return (
        f"run.dir: {str(run.folder)!r} holds a run that is at step {manifest['step']} with other "
        f"settings ({told(changed)}); undo the change, go on with it with run.resume=changed, or "
        f"start again with run.resume=never run.overwrite=true."
    )


def say(run: Run, text: str) -> None:
    if run.world.first:
        print(f"mlkd: {str(run.folder)!r}: {text}", file=sys.stderr, flush=True)
