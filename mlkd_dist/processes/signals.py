"""Being asked to stop: what a launcher and its processes agree on. Imports nothing heavy."""

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Exit code: stopped on request, with all that there was to save in a checkpoint.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A process that gets it writes where each of its threads is.
SHOW_STACKS = signal.SIGUSR2
# Seconds in which further signals count as the same one: launchers and schedulers pass on what has
# come to everybody already.
SAME_SIGNAL = 3.0
# Names the folder in which the processes of `mlkd` leave their pids and exit codes.
VERDICTS = "MLKD_VERDICTS"
PR_SET_PDEATHSIG = 1


class Signals:
    """Handlers that set a flag while there is something to save; before and after that they end
    the process, since whatever it had to save is saved."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.training = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.handle)
        # Also of one that waits inside a library, and so hears no other signal.
        faulthandler.register(SHOW_STACKS)
        if "LOCAL_RANK" in os.environ:
            # A launcher that is killed tells its processes nothing.
            sent_when_parent_dies(signal.SIGTERM)
        tell("pid", os.getpid())

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.training:
            leave(REQUEUE)
        if self.first is None:
            self.first = now
        elif now - self.first > SAME_SIGNAL:
            leave(128 + number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While open, a signal only sets `came`; the second one ends the process."""
        self.training = True
        try:
            yield
        finally:
            self.training = False
        # It came when the last step was over: all is saved.
        if self.came:
            leave(REQUEUE)

    @property
    def came(self) -> bool:
        return self.first is not None


SIGNALLED = Signals()


def sent_when_parent_dies(number: int) -> None:
    """To this process, where the system does that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While open, `handler` gets what asks to stop."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def tell(kind: str, word: object) -> bool:
    """To the `mlkd` that started this process; False where none did."""
    folder = os.environ.get(VERDICTS)
    if folder:
        Path(folder, f"{os.environ['RANK']}.{kind}").write_text(str(word))
    return bool(folder)


def is_first_with(kind: str) -> bool:
    """Whether no other process of the `mlkd` that started this one came here before; True where
    none did."""
    folder = os.environ.get(VERDICTS)
    try:
        if folder:
            Path(folder, kind).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def say(text: str) -> None:
    """Every process says the same; the first one is heard."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"mlkd: {text}", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """At once: a process that waits for others cannot be unwound."""
    tell("code", code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
