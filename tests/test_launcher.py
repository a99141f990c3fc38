"""`mlkd`'s launcher, with processes that only play their part."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from mlkd_dist.processes import launcher

# Starts a process for each part, and waits for them as deepspeed's launcher does: one that fails
# ends it, but not before those that hear no signal.
STARTER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, "-c", PLAYER, part], env=os.environ | {"RANK": str(rank)})
    for rank, part in enumerate(sys.argv[1:])
]
sys.exit(max([rank.wait() for rank in ranks]) != 0)
"""
PLAYER = """
import os, signal, sys, time
from mlkd_dist.processes.signals import SIGNALLED, tell
tell("pid", os.getpid())
match sys.argv[1]:
    case "done" | "refused" | "stopped" as how:
        code = {"done": 0, "refused": 2, "stopped": 75}[how]
        tell("code", code)
        sys.exit(code)
    case "waits in vain":
        time.sleep(0.5)
        tell("lost", "Timed out waiting 500ms for recv operation to complete")
        tell("code", 1)
        os._exit(1)
    case "crashes":
        tell("code", 1)
        os._exit(1)
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "hangs":
        SIGNALLED.install()
        def deep_inside():
            time.sleep(600)
        deep_inside()
    case "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    case "waits":
        time.sleep(600)
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(launcher, "FAULT_GRACE", 5.0)
    program = tmp_path / "starter.py"
    program.write_text(f"PLAYER = {PLAYER!r}\n{STARTER}")

    def play(*parts: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(program), *parts]
        return launcher.launched(command, environment, len(parts))

    return play


@pytest.mark.parametrize("part, code", [("done", 0), ("refused", 2), ("stopped", 75)])
def test_what_all_processes_say_is_the_exit_code(play: Callable, part: str, code: int) -> None:
    assert play(part, part) == code


@pytest.mark.parametrize(
    "parts, said",
    [
        (("waits in vain", "frozen"), "process 1 gave no sign"),
        (("waits in vain", "waits in vain", "frozen"), "in which process 0, 1 waited"),
        (("waits", "killed"), "process 1 died"),
        # It has noticed, and all have ended, before anything is late.
        (("waits in vain", "killed"), "process 1 died"),
        (("crashes", "waits"), "process 0 failed, as said above"),
    ],
)
def test_one_that_fails_or_freezes_ends_all_with_one_sentence(
    play: Callable, capfd: pytest.CaptureFixture, parts: tuple[str, ...], said: str
) -> None:
    begun = time.monotonic()
    assert play(*parts) == 1
    assert time.monotonic() - begun < 60
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mlkd:")]
    assert len(lines) == 1 and said in lines[0] and "all processes are ended" in lines[0]


def test_one_that_hangs_shows_where(play: Callable, capfd: pytest.CaptureFixture) -> None:
    assert play("waits in vain", "hangs") == 1
    said = capfd.readouterr().err
    assert "in deep_inside" in said
    assert "process 1 gave no sign" in said.splitlines()[-1]


def test_no_process_is_left(play: Callable, tmp_path: Path) -> None:
    import psutil

    before = {p.pid for p in psutil.process_iter()}
    play("waits in vain", "frozen")
    left = [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    assert not left


# A launcher that is killed below the one that `mlkd` has started, with the process that it started.
ROBBED = """
import os, pathlib, subprocess, sys, time
ready = pathlib.Path(sys.argv[1]) / "ready"
starts = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
below = subprocess.Popen(
    [sys.executable, "-c", starts, RANK, sys.argv[1]], env=os.environ | {"RANK": "0"}
)
while not ready.exists():
    time.sleep(0.05)
below.kill()
below.wait()
"""
RANK = """
import os, pathlib, signal, sys, time
from mlkd_dist.processes.signals import sent_when_parent_dies, tell
folder, came = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: came.append(number))
sent_when_parent_dies(signal.SIGTERM)
tell("pid", os.getpid())
(folder / "ready").touch()
while not came:
    time.sleep(0.05)
# As long as the launcher may take to be gone.
time.sleep(3)
(folder / "came").write_text(" ".join(map(str, map(int, came))))
tell("code", 75)
sys.exit(75)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
def test_who_has_heard_of_its_launchers_death_hears_it_once(tmp_path: Path) -> None:
    """A signal more than some seconds later would end it, in the midst of saving."""
    program = tmp_path / "robbed.py"
    program.write_text(f"RANK = {RANK!r}\n{ROBBED}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), str(tmp_path)]
    assert launcher.launched(command, environment, 1) == 75
    assert (tmp_path / "came").read_text() == str(int(signal.SIGTERM))
