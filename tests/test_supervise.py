"""`mlkd supervise`, of a run that only plays its part."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from mlkd_dist.processes import supervise
from mlkd_dist.processes.supervise import FRUITLESS, Supervisor
from mlkd_dist.saving import commit

# Takes the first line of its part: how many steps further, and how it ends.
PLAYER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
first, *rest = (folder / "part").read_text().splitlines()
(folder / "part").write_text("\\n".join(rest))
(folder / "starts").open("a").write("x")
further, how = first.split()
at = folder / "at"
at.write_text(str(int(at.read_text()) + int(further)))
if how == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waiting").touch()
    time.sleep(60)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "0":
    (folder / "report.json").touch()
sys.exit(int(how) if how != "empty" else 0)
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Callable[..., Supervisor]:
    (tmp_path / "at").write_text("0")

    def make(*part: str, restarts: int = 20) -> Supervisor:
        (tmp_path / "part").write_text("\n".join(part))
        return Supervisor(
            [sys.executable, "-c", PLAYER, str(tmp_path)],
            restarts,
            lambda: int((tmp_path / "at").read_text()),
            lambda: (tmp_path / "report.json").exists(),
            pause=0,
        )

    return make


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


@pytest.mark.parametrize(
    "part, code, started, why",
    [
        (["5 75", "5 killed", "0 1", "5 0"], 0, 4, "done"),
        (["0 2", "5 0"], 2, 1, "not started again"),
        (["5 1", *["0 1"] * FRUITLESS, "5 0"], 1, 1 + FRUITLESS, "made no new checkpoint"),
        (["0 killed"] * 9, 137, FRUITLESS, "made no new checkpoint"),
        # An exit code of 0 is believed of a run that has written its report.
        (["0 empty"] * 9, 1, FRUITLESS, "made no new checkpoint"),
    ],
)
def test_it_starts_again_while_that_helps(
    supervisor: Callable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    part: list[str],
    code: int,
    started: int,
    why: str,
) -> None:
    assert supervisor(*part).run() == code
    assert starts(tmp_path) == started
    assert why in capfd.readouterr().err.splitlines()[-1]


def test_the_budget_ends_it(
    supervisor: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert supervisor(*["5 75"] * 9, restarts=3).run() == 75
    assert starts(tmp_path) == 4 and "launch.restarts" in capfd.readouterr().err


def test_asked_to_stop_it_asks_the_run_and_starts_no_other(
    supervisor: Callable, tmp_path: Path
) -> None:
    one = supervisor("5 waits", "5 0")

    def ask() -> None:
        while not (tmp_path / "waiting").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    assert one.run() == 75
    asking.join()
    assert starts(tmp_path) == 1


def test_progress_is_read_from_committed_checkpoints(tmp_path: Path) -> None:
    assert supervise.steps(tmp_path) == 0
    for step in (20, 40):
        name = commit.step_name(step)
        commit.begin(tmp_path, name)
        partial = tmp_path / (name + commit.PARTIAL)
        if step == 20:
            commit.commit(tmp_path, name, {"files": {}, "start": None})
    assert partial.exists() and supervise.steps(tmp_path) == 20


def test_a_config_that_is_refused_is_not_started_again(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-m", "mlkd_dist.cli", "supervise", str(tmp_path / "absent.yaml")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "no such file" in run.stderr
