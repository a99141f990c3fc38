"""`mlkd distill` under its launcher: asked to stop, robbed of its launcher, and going on after."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from launches import begin, below, ended, launcher, logged_steps, ranks, until, write


@pytest.fixture
def folder(tmp_path: Path, teachers: dict, data: dict) -> Path:
    return write(tmp_path, teachers["classification"], data)


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_says_75_and_goes_on_after(folder: Path) -> None:
    run = begin(folder)
    until(lambda: (folder / "run/metrics.jsonl").exists() and logged_steps(folder), folder)
    started = below(run)
    assert len(started) >= 4
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=180) == 75, (folder / "log").read_text()[-3000:]
    assert ended(started)
    name = (folder / "run/checkpoints/LATEST").read_text().strip()
    done = int(name.removeprefix("step-"))
    log = (folder / "log").read_text()
    assert log.count(f"stopped after step {done}") == 1 and "Traceback" not in log
    # USR1 to every process of the job, as schedulers send it; the run is the same one.
    again = begin(folder)
    until(lambda: max(logged_steps(folder)) > done, folder)
    started = below(again)
    for process in [psutil.Process(again.pid), *started]:
        process.send_signal(signal.SIGUSR1)
    assert again.wait(timeout=180) == 75, (folder / "log").read_text()[-3000:]
    assert ended(started)
    log = (folder / "log").read_text()
    assert f"resuming from step {done}" in log
    steps = logged_steps(folder)
    assert steps == [*range(len(steps))]


@pytest.mark.slow
def test_robbed_of_its_launcher_it_saves_and_leaves_no_process(folder: Path) -> None:
    run = begin(folder)
    until(lambda: (folder / "run/metrics.jsonl").exists() and logged_steps(folder), folder)
    started = below(run)
    launcher(run).kill()
    # The launcher itself reports success here.
    assert run.wait(timeout=180) == 75, (folder / "log").read_text()[-3000:]
    assert ended(started)
    assert (folder / "run/checkpoints/LATEST").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_failure(folder: Path) -> None:
    run = begin(folder, "run.checkpoint_every=2")
    until(lambda: (folder / "run/checkpoints/LATEST").exists(), folder)
    started = below(run)
    ranks(run)[1].kill()
    code = run.wait(timeout=240)
    assert code not in (0, 2, 75), (folder / "log").read_text()[-3000:]
    assert ended(started)
    assert (folder / "log").read_text().count("process 1 died (of a signal") == 1


@pytest.mark.slow
def test_a_process_that_freezes_ends_all_within_the_time_out(folder: Path) -> None:
    run = begin(folder, "launch.timeout=8")
    until(lambda: (folder / "run/metrics.jsonl").exists() and len(logged_steps(folder)) > 2, folder)
    started = below(run)
    ranks(run)[1].suspend()
    begun = time.monotonic()
    assert run.wait(timeout=240) == 1, (folder / "log").read_text()[-3000:]
    assert time.monotonic() - begun < 40
    assert ended(started)
    log = (folder / "log").read_text()
    assert log.count("process 1 gave no sign") == 1 and "Traceback" not in log
