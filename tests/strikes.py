"""Faults that strike a process at a place of the program, for tests of interrupted runs and for
`make faults`."""

import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import psutil

from mlkd_dist import step
from mlkd_dist.watching import watch

STEP, POINT = "mlkd_dist.stage.train_step", "mlkd_dist.saving.commit.reached"


class Killed(BaseException):
    """Stands for the end of all processes, where many runs share them."""


@dataclass(frozen=True)
class Fault:
    do: str
    """One of ACTIONS."""
    at: str
    """A function by its full name: the fault strikes where it is called."""
    number: int = 1
    """At which call; for STEP before which optimizer step of the run, counted from 0."""
    ranks: tuple[int, ...] | None = None
    """None: all."""
    only: str | None = None
    """Of calls with this first argument alone."""


def kill(call: Callable, args: tuple) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(call: Callable, args: tuple) -> Any:
    call(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_parent(call: Callable, args: tuple) -> Any:
    os.kill(os.getppid(), signal.SIGKILL)
    return call(*args)


def freeze(call: Callable, args: tuple) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return call(*args)


def ask(number: int) -> Callable:
    def send(call: Callable, args: tuple) -> Any:
        os.kill(os.getpid(), number)
        return call(*args)

    return send


def loader(number: int) -> Callable:
    def send(call: Callable, args: tuple) -> Any:
        workers = psutil.Process().children()
        assert workers, "no loader process"
        for worker in workers:
            worker.send_signal(number)
        return call(*args)

    return send


def end(call: Callable, args: tuple) -> Any:
    raise Killed


def no_memory(call: Callable, args: tuple) -> Any:
    raise MemoryError("as if the machine had no more")


def late(call: Callable, args: tuple) -> Any:
    """A day has passed."""
    watch.STARTED -= 24 * 60 * 60
    return call(*args)


def not_finite(call: Callable, args: tuple) -> Any:
    backward = step.backward
    step.backward = lambda student, loss: backward(student, loss * math.nan)
    try:
        return call(*args)
    finally:
        step.backward = backward


def apart(call: Callable, args: tuple) -> Any:
    """This process has other rows than the others, or believes so."""
    args[-1].mark ^= 2
    return call(*args)


def full(call: Callable, args: tuple) -> Any:
    """While it is called, the system refuses to write more than 10 kB to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        return call(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pass_by(call: Callable, args: tuple) -> Any:
    return call(*args)


ACTIONS: dict[str, Callable[[Callable, tuple], Any]] = {
    "kill": kill,
    "kill after": kill_after,
    "kill parent": kill_parent,
    "freeze": freeze,
    "TERM": ask(signal.SIGTERM),
    "USR1": ask(signal.SIGUSR1),
    "INT": ask(signal.SIGINT),
    "kill loader": loader(signal.SIGKILL),
    "freeze loader": loader(signal.SIGSTOP),
    "end": end,
    "no memory": no_memory,
    "late": late,
    "not finite": not_finite,
    "apart": apart,
    "full": full,
    "pass by": pass_by,
}


@contextmanager
def struck_by(
    faults: list[Fault], rank: int, tell: Callable[[Fault], None] = lambda fault: None
) -> Iterator[None]:
    """While open, the faults of this process strike, each once; `tell` hears of it before."""
    with ExitStack() as stack:
        for fault in faults:
            if fault.ranks is None or rank in fault.ranks:
                stack.enter_context(worn(fault, tell))
        yield


@contextmanager
def worn(fault: Fault, tell: Callable[[Fault], None]) -> Iterator[None]:
    owner, name = found(fault.at)
    function, calls = getattr(owner, name), 0

    def place(*args: Any, **named: Any) -> Any:
        nonlocal calls
        if fault.only is None or args[0] == fault.only:
            calls += 1
            number = args[6][1] if fault.at == STEP else calls
            if number == fault.number:
                tell(fault)
                return ACTIONS[fault.do](lambda *a: function(*a, **named), args)
        return function(*args, **named)

    setattr(owner, name, place)
    try:
        yield
    finally:
        setattr(owner, name, function)


def found(path: str) -> tuple[Any, str]:
    """What holds the function of this name: a module, or a class in one."""
    *parts, name = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            owner = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            owner = getattr(owner, part)
        return owner, name
    raise ModuleNotFoundError(path)
