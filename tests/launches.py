"""`mlkd distill` as people start it, with deepspeed's launcher: whole launches, and what is below
them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from conftest import ROOT, run_config

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
}
# Far more than are made before the signal comes.
STEPS = 2000


def begin(folder: Path, *words: str) -> subprocess.Popen:
    log = (folder / "log").open("a")
    command = [sys.executable, "-m", "mlkd_dist.cli", "distill", str(folder / "run.yaml"), *words]
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def until(condition: object, folder: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.2)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def logged_steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def write(folder: Path, teacher: Path, data: dict[str, str]) -> Path:
    """A run of two processes that goes on for long, in a folder for `begin`."""
    stages = [{"name": "one", "steps": STEPS, "losses": {"hidden_mse": {}}}]
    config = run_config(folder, teacher, data, stages=stages)
    config["launch"] = {"processes": 2}
    config["student"]["zero_stage"] = 2
    # A process that loads data must not die of what is sent to all.
    config["data"]["workers"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def ranks(run: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, by rank."""
    found = below(run)
    return [
        next(p for p in found if f"--local_rank={rank}" in p.cmdline() and p.ppid() != run.pid)
        for rank in range(2)
    ]


def launcher(run: subprocess.Popen) -> psutil.Process:
    (found,) = [p for p in below(run) if "deepspeed.launcher.launch" in " ".join(p.cmdline())]
    return found
