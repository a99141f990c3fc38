"""Real processes of a run, each forked from one that has imported all there is to import: a start
takes a second, and each may be killed, frozen and asked to stop."""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from strikes import Fault, struck_by

from mlkd_dist.processes.launcher import there
from mlkd_dist.processes.signals import REQUEUE, VERDICTS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["faults.programs"])
# Seconds after which a case has failed, and its processes are ended.
LIMIT = 180.0
# Seconds that the others have to end by themselves once one of them has failed.
GRACE = 10.0


@dataclass
class Outcome:
    codes: list[int | None]
    """Of every process; below 0 the signal it died of, None where it had to be ended."""
    struck: int
    """Faults that did."""
    noticed: float | None
    """Seconds from the last fault until all processes had ended that were able to."""
    log: str = field(repr=False)


def run(
    program: str,
    words: list[str],
    folder: Path,
    world: int,
    faults: list[Fault] | None = None,
    parent: bool = False,
    limit: float = LIMIT,
) -> Outcome:
    """One start of `world` processes; with `parent` they have one of their own, as under a
    launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / f"told-{len(list(folder.glob('told-*')))}"
    told.mkdir()
    order = Order(program, words, told, world, port(), faults or [])
    if parent:
        processes = [FORKS.Process(target=nurse, args=(order,))]
    else:
        processes = [FORKS.Process(target=play, args=(order, rank)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        frozen = wait(order, processes, limit)
    finally:
        for pid in {process.pid for process in processes} | set(pids(told)):
            if there(pid):
                end(pid)
        for process in processes:
            process.join()
    return outcome(order, processes, frozen)


def port() -> int:
    from mlkd_dist.processes.network import free_port

    return free_port()


@dataclass
class Order:
    """What the processes of one start are told."""

    program: str
    words: list[str]
    told: Path
    world: int
    port: int
    faults: list[Fault]


def nurse(order: Order) -> None:
    children = []
    for rank in range(order.world):
        children.append(os.fork())
        if not children[-1]:
            try:
                play(order, rank)
            except SystemExit as error:
                os._exit(error.code)
            os._exit(1)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))


def play(order: Order, rank: int) -> None:
    """One process of a run, from its environment on."""
    from faults.programs import PROGRAMS
    from mlkd_dist.watching import watch

    shared = {"WORLD_SIZE": order.world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order.port}
    shared |= {"RANK": rank, "LOCAL_RANK": rank, VERDICTS: order.told}
    os.environ.update({key: str(value) for key, value in shared.items()})
    log = os.open(order.told / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # It was imported when the first of all runs began.
    watch.STARTED = time.monotonic()

    def tell(fault: Fault) -> None:
        (order.told / f"{rank}-{order.faults.index(fault)}.struck").touch()

    code = 1
    try:
        with struck_by(order.faults, rank, tell):
            code = PROGRAMS[order.program](order.words)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.exit(code)


def pids(told: Path) -> list[int]:
    return list(numbers(told, "pid").values())


def codes(told: Path) -> dict[int, int]:
    return numbers(told, "code")


def numbers(told: Path, kind: str) -> dict[int, int]:
    """What the processes have told; a file that is just being written is empty."""
    texts = {int(path.stem): path.read_text() for path in told.glob(f"*.{kind}")}
    return {rank: int(text) for rank, text in texts.items() if text}


def wait(order: Order, processes: list, limit: float) -> list[int]:
    """Until all have ended that can; the pids of the others. As `mlkd` does, once one has said that
    something is wrong the others have some seconds, if they are not frozen."""
    end = time.monotonic() + limit
    while True:
        alive = [p.pid for p in processes if p.is_alive()]
        alive += [pid for pid in pids(order.told) if there(pid) and pid not in alive]
        if not alive or time.monotonic() > end:
            return alive
        if any(code not in (0, 2, REQUEUE) for code in codes(order.told).values()):
            if all(map(stopped, alive)):
                return alive
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.05)


def end(pid: int) -> None:
    """With what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def outcome(order: Order, processes: list, frozen: list[int]) -> Outcome:
    told = codes(order.told)
    if len(processes) == order.world:
        found = [None if p.pid in frozen else p.exitcode for p in processes]
    else:
        found = [told.get(rank) for rank in range(order.world)]
    struck = [path.stat().st_mtime for path in order.told.glob("*.struck")]
    ends = [path.stat().st_mtime for path in order.told.glob("*.code")]
    noticed = max(ends) - max(struck) if struck and ends else None
    log = "".join((order.told / f"{r}.log").read_text() for r in range(order.world))
    return Outcome(found, len(struck), noticed, log)
