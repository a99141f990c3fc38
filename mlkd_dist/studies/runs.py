"""The runs of a study, as children of this process, each with the program and the folder of
`mlkd distill`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from mlkd_dist import config as configs
from mlkd_dist.config import UserError
from mlkd_dist.finetune import finetune_config
from mlkd_dist.finetune import finished as teacher_finished
from mlkd_dist.processes.signals import REQUEUE, SIGNALS
from mlkd_dist.studies.folder import alone, check_folder, finished, save
from mlkd_dist.studies.plot import write_plots
from mlkd_dist.studies.results import write_results
from mlkd_dist.studies.study import Plan, Planned, plan

PROGRAM = [sys.executable, "-m", "mlkd_dist.cli"]


def main(path: str, words: list[str]) -> int:
    """`mlkd study`. Raises UserError."""
    asked = plan(path, words)
    if "RANK" in os.environ:
        raise UserError(
            "mlkd study starts its own processes; start it once, outside of a launcher."
        )
    check_jobs(asked)
    check_folder(asked.folder)
    with alone(asked.folder) as lock:
        there(asked)
        save(asked)
        with Children(lock, asked.study.jobs, asked.base.launch.processes) as children:
            code = make_teacher(asked, children) or make_runs(asked, children)
        table = write_results(asked)
        print(f"\n{table}\n")
        for line in write_plots(asked):
            print(line)
        print(f"tables: {asked.folder / 'study.md'}, study.csv, study.json", flush=True)
    return code


def check_jobs(asked: Plan) -> None:
    if asked.study.jobs == 1:
        return
    import torch

    if torch.cuda.is_available():
        raise UserError(
            f"jobs: {asked.study.jobs} runs at a time would share the GPUs here, each counting on "
            f"them alone; use jobs=1."
        )


def make_teacher(asked: Plan, children: "Children") -> int:
    """The teacher of all runs, where the base fine-tunes one and it is not there yet."""
    if asked.base.teacher.finetune is None or teacher_finished(finetune_config(asked.base)):
        return 0
    path = asked.folder / "teacher.yaml"
    configs.save(asked.base, path)
    print(f"teacher: {asked.base.teacher.finetune.dir}, log in {path.with_suffix('.log')}")
    children.start("finetune", path, None)
    ((_, code),) = children.ended()
    return told_failure(code, path.with_suffix(".log"))


def there(asked: Plan) -> list[Planned]:
    """The finished runs. UserError where one is of another study."""
    return [run for run in asked.runs if finished(run, asked.study.overwrite)]


def make_runs(asked: Plan, children: "Children") -> int:
    """The exit code of the study. A run that fails does not keep the others from being made, but
    for a mistake of the user, which all are likely to share. What is there is looked at again,
    beside the teacher that was just made."""
    reused = there(asked)
    print(f"{len(asked.runs)} runs, {len(reused)} of them finished", flush=True)
    waiting = [run for run in asked.runs if run not in reused]
    worst, count = 0, len(reused)
    while waiting or children.running:
        if worst in (2, REQUEUE) or children.stopped:
            waiting.clear()
        while waiting and children.free:
            run = waiting.pop(0)
            path = run.folder.with_name(f"{run.folder.name}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            configs.save(run.config, path)
            children.start("distill", path, run)
        for run, code in children.ended():
            if code == 0:
                count += 1
                # Each as large as six students; nothing goes on from a finished run.
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
                print(f"[{count}/{len(asked.runs)}] {run.name}", flush=True)
                write_results(asked)
            told = told_failure(code, run.folder.with_name(f"{run.folder.name}.log"))
            worst = told if worst == 0 or told in (2, REQUEUE) else worst
    return REQUEUE if children.stopped and count < len(asked.runs) else worst


def told_failure(code: int, log: Path) -> int:
    """What a child that did not end well means for the study: the user's mistake (2), a stop
    (REQUEUE), else 1."""
    if code == 0:
        return 0
    if code == REQUEUE:
        print("mlkd: stopped on request; start it again to go on.", file=sys.stderr)
        return REQUEUE
    lines = log.read_text(errors="replace").splitlines()
    if code == 2 and (said := [line for line in lines if line.startswith("mlkd: error: ")]):
        print(said[-1], file=sys.stderr)
        return 2
    print(f"mlkd: error: exit code {code}; the end of {log}:", file=sys.stderr)
    print("\n".join(lines[-15:]), file=sys.stderr, flush=True)
    return 1


@dataclass
class Children:
    """At most `jobs` programs at a time, of so many processes each. A signal to this process goes
    on to them."""

    lock: IO[str]
    jobs: int
    processes: int
    running: dict[subprocess.Popen, Planned | None] = field(default_factory=dict)
    stopped: bool = False

    @property
    def free(self) -> bool:
        return len(self.running) < self.jobs

    def start(self, command: str, config: Path, run: Planned | None) -> None:
        environment = dict(os.environ)
        # The teacher is made before the runs, alone.
        if self.jobs > 1 and run is not None:
            threads = (os.cpu_count() or 1) // (self.jobs * self.processes)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        with config.with_suffix(".log").open("w") as log:
            child = subprocess.Popen(
                [*PROGRAM, command, str(config)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Held as long as the child lives.
                pass_fds=[self.lock.fileno()],
                # A session of its own: what is left of it can be ended as one.
                start_new_session=True,
            )
        self.running[child] = run
        if self.stopped:
            child.send_signal(signal.SIGTERM)

    def __enter__(self) -> "Children":
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        for child in self.running:
            child.send_signal(signal.SIGTERM)

    def ended(self) -> list[tuple[Planned | None, int]]:
        """Waits until one or more have ended; their runs and exit codes. None where none runs."""
        while self.running:
            if done := [child for child in self.running if child.poll() is not None]:
                return [(self.running.pop(child), self.verdict(child)) for child in done]
            time.sleep(0.1)
        return []

    def verdict(self, child: subprocess.Popen) -> int:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return REQUEUE if self.stopped and child.returncode else child.returncode
