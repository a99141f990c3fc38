"""`mlkd doctor`: what this machine, or the processes that a launcher started, can do, and what of a
run will not work there.

`python -m torch.utils.collect_env` and `ds_report` list what is installed; here stands what a run
would stumble over, each with the one thing to do. The checks of one machine are in machine.py.
"""

import fcntl
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlkd_dist.config import UserError, load
from mlkd_dist.planning.machine import FAIL, MACHINE, OK, WARN, Asked, Finding
from mlkd_dist.processes.versions import refuse_different, versions
from mlkd_dist.rules.allowed import nearest
from mlkd_dist.saving.commit import writable

# Seconds that the processes wait for one another here.
PATIENCE = 180.0


def asked(words: list[str]) -> Asked:
    """[CONFIG] [processes=N] [json=FILE] and settings of the config. Raises UserError."""
    path = words[0] if words and "=" not in words[0] else None
    own: dict[str, str] = {}
    settings = []
    for word in words[path is not None :]:
        key, _, value = word.partition("=")
        if key in ("processes", "json"):
            own[key] = value
        else:
            settings.append(word)
    if settings and path is None:
        close = nearest(settings[0].partition("=")[0], ["processes", "json"])
        raise UserError(
            f"argument {settings[0]!r}: without a config, `mlkd doctor` takes processes=N and "
            f"json=FILE only{close}."
        )
    config = load(path, settings) if path is not None else None
    processes = own.get("processes") or str(config.launch.processes if config else 1)
    if not processes.isdecimal() or int(processes) < 1:
        raise UserError(f"processes: {processes!r} is not allowed; give a number from 1 on.")
    if "json" in own and not writable(own["json"]):
        raise UserError(f"json: {own['json']!r} cannot be written; name a file.")
    return Asked(config, int(processes), own.get("json"))


def doctor(what: Asked) -> int:
    """Prints a line per finding; the exit code."""
    # Once per machine: one process speaks for those beside it.
    mine = [found(c, what) for c in MACHINE] if os.environ.get("LOCAL_RANK", "0") == "0" else []
    everyone = [(socket.gethostname(), mine)]
    packages_fail = any(f.name == "packages" and f.state == FAIL for f in mine)
    if not packages_fail and ("RANK" in os.environ or what.config is not None):
        everyone = together(what, mine)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(table(everyone)))
        if what.json is not None:
            Path(what.json).write_text(json.dumps(as_json(everyone), indent=2) + "\n")
    return int(any(f.state == FAIL for _, findings in everyone for f in findings))


def found(check: Callable[..., Finding], *about: Any) -> Finding:
    """What a check finds; one that breaks has found something, too."""
    try:
        return check(*about)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Finding(check.__name__, FAIL, said, "see this error")


def together(what: Asked, mine: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """The checks that processes make with one another, and those on a config."""
    from mlkd_dist.engine import start, stop
    from mlkd_dist.processes.world import gather_objects

    host = socket.gethostname()
    try:
        world = start(PATIENCE)
        checks = [replicas, clocks, all_reduce, shared_folder] if world.size > 1 else []
        checks += [runnable] if what.config is not None else []
        for check in checks:
            mine.append(found(check, what, world))
        return gather_objects((host, mine))
    except Exception as error:
        said = f"they did not meet: {' '.join(str(error).split())[:300]}"
        todo = "see that MASTER_ADDR and MASTER_PORT can be reached from all machines, and name "
        return [(host, [*mine, Finding("processes", FAIL, said, todo + "the card: MLKD_NIC")])]
    finally:
        stop()


def table(everyone: list[tuple[str, list[Finding]]]) -> list[str]:
    """All lines of the first process, and of the others what is not well with their machines."""
    lines = []
    shown = {check.__name__ for check in MACHINE}
    for rank, (host, findings) in enumerate(everyone):
        for f in findings:
            if rank and (f.state == OK or f.name not in shown):
                continue
            where = f"{host}: " if rank else ""
            todo = f" -> {f.todo}" if f.todo else ""
            lines.append(f"{f.state:<5} {f.name.replace('_', ' '):<14} {where}{f.said}{todo}")
    return lines


def as_json(everyone: list[tuple[str, list[Finding]]]) -> dict[str, Any]:
    return {
        "processes": [
            {"process": rank, "host": host, "findings": [asdict(f) for f in findings]}
            for rank, (host, findings) in enumerate(everyone)
        ]
    }


def replicas(what: Asked, world: Any) -> Finding:
    """That all processes have the same packages."""
    from mlkd_dist.processes.world import gather_objects

    told = gather_objects((socket.gethostname(), versions()))
    hosts = dict.fromkeys(host for host, _ in told)
    said = f"{world.size} processes on {len(hosts)} machines ({', '.join(hosts)})"
    try:
        refuse_different([theirs for _, theirs in told])
    except UserError as error:
        return Finding("replicas", FAIL, str(error).partition("; ")[0], "install the same versions")
    return Finding("replicas", OK, f"{said}, the same versions")


def clocks(what: Asked, world: Any) -> Finding:
    from mlkd_dist.processes.world import barrier, gather_objects

    barrier()
    told = gather_objects(time.time())
    apart = max(told) - min(told)
    if apart > 5:
        said = f"the machines' clocks are {apart:.0f} s apart"
        return Finding("clocks", WARN, said, "run NTP on them: logs and caches go by the time")
    return Finding("clocks", OK, "the same time on all machines")


def all_reduce(what: Asked, world: Any) -> Finding:
    """Latency of a small one, bandwidth of a large one: medians."""
    import torch

    from mlkd_dist.processes.world import all_reduce as summed
    from mlkd_dist.processes.world import barrier

    def seconds(count: int, rounds: int) -> float:
        took = []
        for _ in range(rounds):
            ones = torch.ones(count, device=world.device)
            barrier()
            begun = time.perf_counter()
            total = summed(ones)[-1].item()
            took.append(time.perf_counter() - begun)
            assert total == world.size, f"{world.size} ones add up to {total}"
        # The first one makes the connections.
        return statistics.median(took[1:])

    gpu = world.device.type == "cuda"
    count = 2 ** (26 if gpu else 22)
    latency, large = seconds(1, 11), seconds(count, 6)
    # What one process sends in a ring, as NCCL's tests count it.
    rate = 2 * (world.size - 1) / world.size * 4 * count / large / 1e9
    cards = os.environ.get("NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME", "its own choice")
    said = f"{latency * 1e3:.2f} ms for 4 B, {rate:.2f} GB/s for {4 * count // 2**20} MiB ("
    said += f"{'nccl' if gpu else 'gloo'}, card: {cards})"
    if rate < (5 if gpu else 0.05):
        return Finding("all_reduce", WARN, said, "see NCCL_DEBUG=INFO for the path; name the card")
    return Finding("all_reduce", OK, said)


def shared_folder(what: Asked, world: Any) -> Finding:
    """That all machines see one run folder, and one another's locks on it."""
    from mlkd_dist.processes.world import broadcast_object, gather_objects

    folder = Path(what.config.run.dir if what.config else ".").absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    probe = Path(broadcast_object(str(there / f".mlkd-doctor-{os.getpid()}")))
    held = None
    if world.first:
        held = probe.open("w")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    broadcast_object("it is there")
    told = gather_objects((socket.gethostname(), "held" if world.first else seen(probe)))
    if held is not None:
        probe.unlink()
        held.close()
    for host, state in told:
        if state == "missing":
            said = f"{host} does not see what process 0 writes to {probe.parent}"
            return Finding("shared_folder", FAIL, said, "run.dir on a disk that all machines see")
        if state == "free":
            said = f"{host} does not see a lock of process 0 in {probe.parent}"
            todo = "start no two programs on one run.dir; nothing else keeps them apart"
            return Finding("shared_folder", WARN, said, todo)
    return Finding("shared_folder", OK, f"all see {probe.parent}, and locks in it")


def seen(probe: Path) -> str:
    if not probe.exists():
        return "missing"
    with probe.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "held"
    return "free"


def runnable(what: Asked, world: Any) -> Finding:
    """What `mlkd distill` refuses before weights load: run.dir, models, data, DeepSpeed's block."""
    from mlkd_dist.models.model import quiet
    from mlkd_dist.preflight import check_start, prepared
    from mlkd_dist.run import source

    quiet()
    config = what.config
    try:
        found = check_start(config, world)
        run = prepared(config, world, source(config))
    except UserError as error:
        return Finding("runnable", FAIL, str(error), "correct the config")
    return Finding("runnable", OK, f"a {found} run, {len(run.train)} rows to learn from")
