"""Faults of a run as people start it, with deepspeed's launcher: how soon all of it has ended, with
which exit code, and what is left running."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launches

from faults.work import Figure, Work, case

# Seconds, of launch.timeout.
TIMEOUT = 10
# Seconds after which a launch has failed.
LIMIT = 300


@dataclass
class Launch:
    """One, what is done to it, and what is to come of it."""

    name: str
    strike: Callable[[subprocess.Popen], object]
    code: int
    within: float | None
    """Seconds; None where it saves first, as it was asked to."""
    said: str


def loader(run: subprocess.Popen) -> None:
    (worker, *_) = launches.ranks(run)[1].children()
    worker.suspend()


LAUNCHES = [
    Launch("a frozen process", lambda r: launches.ranks(r)[1].suspend(), 1, 20, "1 gave no sign"),
    Launch("a dead process", lambda r: launches.ranks(r)[1].kill(), 1, 5, "process 1 died"),
    Launch(
        "the first process frozen", lambda r: launches.ranks(r)[0].suspend(), 1, 20, "0 gave no"
    ),
    Launch("the first process dead", lambda r: launches.ranks(r)[0].kill(), 1, 5, "process 0 died"),
    Launch("a frozen process that loads data", loader, 1, 20, "process 1 gave no sign"),
    Launch("the launcher killed", lambda r: launches.launcher(r).kill(), 75, None, "stopped after"),
    Launch("SIGTERM", lambda r: r.send_signal(signal.SIGTERM), 75, None, "stopped after step"),
    Launch("SIGUSR1 to all", lambda r: to_all(r, signal.SIGUSR1), 75, None, "stopped after step"),
]


def to_all(run: subprocess.Popen, number: int) -> None:
    for process in launches.below(run):
        process.send_signal(number)
    run.send_signal(number)


def measure(work: Work) -> list[Figure]:
    place = work.place("noticed")
    cases = [
        case(place, each.name, lambda e=each: struck(work, place.base / e.name, e))
        for each in work.some(LAUNCHES, 1)
    ]
    figures = [of(cases, "dead", 5), of(cases, "frozen", 20)]
    wrong = sum(not each.get("right", False) for each in cases)
    orphans = sum(each.get("orphans", 1) for each in cases)
    text = f"of {len(cases)} launches"
    figures.append(Figure("wrong exit codes", "0", f"{wrong} {text}", not wrong, cases))
    figures.append(Figure("processes left over", "0", f"{orphans} {text}", not orphans))
    return [figure for figure in figures if figure]


def of(cases: list[dict[str, Any]], what: str, limit: float) -> Figure | None:
    seconds = {c["case"]: c.get("ended", float("inf")) for c in cases if what in c["case"]}
    if not seconds:
        return None
    told = ", ".join(f"{name}: {value:.1f}" for name, value in seconds.items())
    name = f"seconds until all have ended, {what} (time-out {TIMEOUT} s)"
    return Figure(name, f"{limit:.0f} at most", told, max(seconds.values()) <= limit)


def struck(work: Work, folder: Path, launch: Launch) -> dict[str, Any]:
    folder.mkdir()
    launches.write(folder, work.teacher, work.data)
    run = launches.begin(folder, f"launch.timeout={TIMEOUT}")
    started = []
    try:
        log = folder / "run/metrics.jsonl"
        launches.until(lambda: log.exists() and len(launches.logged_steps(folder)) > 2, folder)
        started = launches.below(run)
        begun = time.monotonic()
        launch.strike(run)
        code = run.wait(timeout=LIMIT)
        ended = time.monotonic() - begun
        alive = [] if launches.ended(started) else [p.cmdline() for p in started if p.is_running()]
    finally:
        for process in [*started, run]:
            try:
                process.kill()
            except ProcessLookupError:
                pass
            except launches.psutil.NoSuchProcess:
                pass
        run.wait()
    text = (folder / "log").read_text()
    right = code == launch.code and launch.said in text
    soon = launch.within is None or ended <= launch.within
    found = {"passed": right and soon and not alive, "code": code, "right": right}
    found |= {"ended": round(ended, 1), "orphans": len(alive), "left": alive}
    return found if found["passed"] else found | {"log": text[-2000:]}
