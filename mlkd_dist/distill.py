"""The program: a config in, a distilled student out.

mlkd distill CONFIG [key=value ...]
deepspeed --module mlkd_dist.distill CONFIG [key=value ...]
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from mlkd_dist import config as configs
from mlkd_dist.bench import bench
from mlkd_dist.cache.plan import check_cache, require
from mlkd_dist.cache.write import write_cache
from mlkd_dist.checkpoint import Checkpoints, NotSaved, Position
from mlkd_dist.config import Config, UserError
from mlkd_dist.engine import start, stop
from mlkd_dist.evaluate import Evaluator, report
from mlkd_dist.finetune import finetune_config, finished, with_finetuned_teacher
from mlkd_dist.models.model import quiet
from mlkd_dist.planning.doctor import asked, doctor
from mlkd_dist.planning.shortage import is_shortage, say_shortage
from mlkd_dist.preflight import check_machine, check_start, prepared
from mlkd_dist.processes.signals import REQUEUE, SIGNALLED, leave, say, tell
from mlkd_dist.processes.versions import check_versions, refuse_different, versions
from mlkd_dist.processes.waiting import lost_contact
from mlkd_dist.processes.world import World, gather_objects
from mlkd_dist.run import (
    FINISHED,
    Run,
    alone,
    headless_student,
    list_bad_rows,
    on_first,
    other_settings,
    source,
    told,
    user_errors,
)
from mlkd_dist.saving.commit import unfinished
from mlkd_dist.saving.fingerprints import other_teacher
from mlkd_dist.saving.resume import open_run
from mlkd_dist.stage import run_stage, stopped
from mlkd_dist.watching.validation import Validation
from mlkd_dist.watching.watch import Desynchronised, Diverged, Stopped, Watch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mlkd_dist.distill", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument(
        "--command", choices=[*COMMANDS, "doctor"], default="distill", help="what to do"
    )
    parser.add_argument(
        "--local_rank", help="given by the deepspeed launcher; the environment says it too"
    )
    given = parser.parse_args(arguments)
    if given.config is None and given.command != "doctor":
        parser.error("the following arguments are required: config")
    SIGNALLED.install()
    code = program(given)
    tell("code", code)
    return code


def program(given: argparse.Namespace) -> int:
    config = None
    try:
        if given.command == "doctor":
            return doctor(asked([given.config, *given.settings] if given.config else []))
        check_versions()
        config = configs.load(given.config, given.settings)
        world = start()
        refuse_different(gather_objects(versions()))
        quiet()
        COMMANDS[given.command](config, world)
        return 0
    except UserError as error:
        say(f"error: {error}")
        return 2
    except Stopped as error:
        say(str(error))
        return REQUEUE
    except (Desynchronised, Diverged, NotSaved) as error:
        say(f"error: {error}")
        return 1
    except Exception as error:
        if config is not None and is_shortage(error):
            short(config)
            return 1
        failed(error)
        raise
    finally:
        stop()


def placed() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def short(config: Config) -> None:
    """The end of a process that ran out of memory."""
    rank, size = placed()
    try:
        say_shortage(config, rank, size)
    finally:
        # Others may wait for it.
        if size > 1:
            leave(1)


def failed(error: Exception) -> None:
    """The end of a process that others may wait for: it neither asks them nor is in their way."""
    rank, size = placed()
    if size == 1:
        return
    if reason := lost_contact(error):
        # Where `mlkd` started the processes, it hears them all and says who is missing.
        if not tell("lost", reason):
            print(
                f"mlkd: error: process {rank} waited in vain for the others ({reason}); see "
                f"launch.timeout.",
                file=sys.stderr,
            )
    else:
        traceback.print_exc()
    leave(1)


def distill(config: Config, world: World) -> None:
    """All stages of a run, and its report; or what of it is still to be done."""
    found = check_start(config, world)
    if found == FINISHED:
        on_first(world, user_errors(lambda: refuse_other_teacher(config)))
        say(f"{config.run.dir!r} is finished; run.overwrite=true makes it anew.")
        return
    if config.teacher.cache is not None:
        on_first(world, user_errors(lambda: require(config)))
    if config.teacher.finetune is not None:
        finetune_teacher(config, world)
        config = with_finetuned_teacher(config)
    whole_run(config, world, found, compare=True)


def refuse_other_teacher(config: Config) -> None:
    """Of a run that is done."""
    if config.teacher.finetune is not None:
        finished(finetune_config(config))
    path = with_finetuned_teacher(config).teacher.path
    if other_teacher(json.loads((Path(config.run.dir) / "report.json").read_text()), path):
        raise UserError(
            f"run.dir: {config.run.dir!r} holds a finished run of another teacher than {path!r} is "
            f"now; choose another folder, or replace it with run.overwrite=true."
        )


def whole_run(config: Config, world: World, found: str, compare: bool) -> None:
    """From what is `found` in its folder to the report; with `compare` of the student
    before, too."""
    run = prepared(config, world, source(config))
    if config.teacher.cache is not None:
        check_cache(run)
    with alone(run.folder, world):
        student_path, checkpoints, at = open_run(run, found)
        list_bad_rows(run)
        evaluator = Evaluator(run)

        # A student that is still to get its head says nothing yet.
        compare = compare and not headless_student(run)

        def before() -> Any:
            # Its time is that of the student after, which is taken beside the teacher's.
            student = config.student
            return evaluator(student_path, student.dtype, student.attention, timed=False)

        evaluated = before() if compare and at.done == 0 else None
        with SIGNALLED.deferred():
            train(run, checkpoints, at, student_path, evaluator)
        report(evaluator, evaluated or (before() if compare else None))


def train(
    run: Run, checkpoints: Checkpoints, at: Position, student_path: str, evaluator: Evaluator
) -> None:
    """Each stage loads the student that the one before left, and inherits no optimizer state."""
    watch = Watch(run.config.run, run.world)
    stages, settings = run.config.stages, run.config.run
    left = at.stage < len(stages)
    validation = Validation(evaluator) if settings.evaluate_every and left else None
    while at.stage < len(stages):
        at = run_stage(run, stages[at.stage], at, student_path, checkpoints, watch, validation)
        if watch.stop:
            raise Stopped(stopped(at))
    if settings.export == "best" and checkpoints.best is None:
        say(
            "warning: no student is known to be the best, by an evaluation with a finite measure "
            "and files that are sound; the export is the last one."
        )


def finetune_teacher(config: Config, world: World) -> None:
    """Train `teacher.path` on the task's labels, with the student's engine and hard labels. A
    finished one that was made by the same settings is used again."""
    own = finetune_config(config)
    if on_first(world, lambda: finished(own)):
        return
    whole_run(own, world, check_start(own, world), compare=False)


def cache(config: Config, world: World) -> None:
    """What the teacher says of the training rows, written for `teacher.cache`."""
    if config.teacher.cache is None:
        raise UserError(
            "teacher.cache: `mlkd cache` writes to the folder it names; give teacher.cache.dir."
        )
    on_first(world, user_errors(lambda: check_machine(config)))
    if config.teacher.finetune is not None:
        finetune_teacher(config, world)
        config = with_finetuned_teacher(config)
    write_cache(prepared(config, world, source(config)))


def evaluate(config: Config, world: World) -> None:
    """The report of a run that is done, once more; with other settings it is only shown."""
    config = with_finetuned_teacher(config)
    folder = Path(config.run.dir)
    if not (folder / "export").is_dir():
        raise UserError(f"run.dir: {config.run.dir!r} has no export; run `mlkd distill` first.")
    if unfinished(folder, len(config.stages)):
        raise UserError(
            f"run.dir: {config.run.dir!r} is not done, and its export is that of an earlier stage; "
            f"run `mlkd distill` to its end first."
        )
    run = prepared(config, world, str(folder / "export"))
    with alone(folder, world):
        changed = other_settings(config, by_name=True)
        if not changed:
            list_bad_rows(run)
        report(Evaluator(run), written=not changed)
    if changed:
        say(f"report.json is left as it is: this is of other settings ({told(changed)}).")


COMMANDS = {
    "distill": distill,
    "finetune": finetune_teacher,
    "evaluate": evaluate,
    "bench": bench,
    "cache": cache,
}


if __name__ == "__main__":
    sys.exit(main())
