"""`mlkd`: distill, supervise, finetune, cache, evaluate, bench, plan, export, study, doctor. Where
no launcher has started it, it starts deepspeed's for more than one process."""

import argparse
import json
import os
import sys
from typing import Any

from mlkd_dist import __version__
from mlkd_dist.config import UserError, load
from mlkd_dist.finetune import finetune_config
from mlkd_dist.processes.launcher import launched
from mlkd_dist.processes.supervise import supervise
from mlkd_dist.processes.versions import FLOORS, check_versions, installed

HELP = {
    "distill": "distil a student from a teacher, stage by stage",
    "supervise": "distill, started again after whatever ends it, while there is progress",
    "finetune": "train the teacher of a config on the task's labels",
    "cache": "run the teacher once over the training rows, for teacher.cache",
    "bench": "time the step of each stage beside its floor, and each loss; see bench.rounds",
    "evaluate": "report on a run that is done; CONFIG may be its folder",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mlkd", description="Multi-level knowledge distillation, sharded."
    )
    parser.add_argument("--version", action="version", version=f"mlkd_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="a YAML file; see configs/")
        command.add_argument(
            "settings",
            nargs="*",
            metavar="key=value",
            help="over the file, for example optim.lr=1e-4",
        )
    add_export(commands)
    add_plan(commands)
    add_study(commands)
    add_doctor(commands)
    given = parser.parse_args()
    try:
        return OTHERS.get(given.command, run)(given)
    except UserError as error:
        print(f"mlkd: error: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace) -> int:
    """A command on a config, in the processes that it asks for."""
    path = given.config
    if given.command == "evaluate" and os.path.isdir(path):
        # The folder may have been moved since it was written.
        given.settings.insert(0, f"run.dir={json.dumps(path)}")
        path = os.path.join(path, "config.yaml")
    check_versions()
    config = load(path, given.settings)
    if given.command == "finetune" or config.teacher.finetune is not None:
        finetune_config(config)
    if given.command == "supervise":
        return supervise(config, path, given.settings)
    words = ["--command", given.command, path, *given.settings]
    if config.launch.processes > 1 and "RANK" not in os.environ:
        return launch(config.launch.processes, words)
    # Heavy imports only once the config is known to be good.
    from mlkd_dist.distill import main as program

    return program(words)


def add_export(commands: Any) -> None:
    text = "read a run's student back, copy it, or merge its factors into an ordinary folder"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("run", help="the run's folder")
    command.add_argument("out", nargs="?", help="a new folder; without it the export is read only")
    command.add_argument(
        "--dense", action="store_true", help="merge factors; OUT is then RUN/export-dense"
    )


def run_export(given: argparse.Namespace) -> int:
    from mlkd_dist.export import export

    print(export(given.run, given.out, given.dense))
    return 0


def add_plan(commands: Any) -> None:
    text = "memory per process and traffic per step of a run, from config files alone"
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("config", help="a YAML file; see configs/")
    command.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="nodes, gpus_per_node, gpu_memory and reserve (GiB), bandwidth and node_bandwidth "
        "(GB/s per GPU, to all and inside its node), tflops, files to write (out, json), and "
        "settings of the run",
    )


def run_plan(given: argparse.Namespace) -> int:
    from mlkd_dist.plan import main as plan

    print(plan(given.config, given.settings))
    return 0


def add_study(commands: Any) -> None:
    text = "methods x seeds x budgets on one task: runs, a table of means and spreads, plots"
    command = commands.add_parser("study", help=text, description=text)
    command.add_argument(
        "study", help="a YAML file; see configs/studies/ and mlkd_dist/studies/study.py"
    )
    command.add_argument(
        "settings", nargs="*", metavar="key=value", help="over the base of all runs, or seeds=[0,1]"
    )


def run_study(given: argparse.Namespace) -> int:
    from mlkd_dist.studies.runs import main as study

    return study(given.study, given.settings)


def add_doctor(commands: Any) -> None:
    text = "what this machine and cluster can do for a run, and what will not work"
    command = commands.add_parser("doctor", help=text, description=text)
    command.add_argument(
        "words",
        nargs="*",
        metavar="[CONFIG] key=value",
        help="a YAML file and settings of it; processes=N, json=FILE to write",
    )


def run_doctor(given: argparse.Namespace) -> int:
    from mlkd_dist.planning.doctor import asked, doctor

    what = asked(given.words)
    here = all(installed(name) is not None for name in FLOORS)
    if what.processes > 1 and "RANK" not in os.environ and here:
        return launch(what.processes, ["--command", "doctor", *given.words])
    return doctor(what)


OTHERS = {"export": run_export, "plan": run_plan, "study": run_study, "doctor": run_doctor}


def launch(processes: int, words: list[str]) -> int:
    """The program under the deepspeed launcher, on this machine."""
    import torch

    from mlkd_dist.processes.network import free_port

    environment = dict(os.environ)
    if torch.cuda.is_available():
        if processes > torch.cuda.device_count():
            print(
                f"mlkd: error: launch.processes: {processes} is more than the "
                f"{torch.cuda.device_count()} GPUs here.",
                file=sys.stderr,
            )
            return 2
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        # Each process would else start a thread per core.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    command += ["--num_accelerators", str(processes), "--master_port", str(free_port())]
    command += ["--module", "mlkd_dist.distill", *words]
    return launched(command, environment, processes)


if __name__ == "__main__":
    sys.exit(main())
