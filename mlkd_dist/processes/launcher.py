"""The deepspeed launcher as a child that can be asked to stop and whose word is checked.

On its own (0.19.8, one machine) it dies of a signal and leaves its processes running, it kills them
30 s after one, whatever they are saving, and it reports success where its own child was killed. So
signals go to the training processes themselves, these leave their exit codes in a folder, and what
is left over when the launcher is gone, or when one of them has failed, is ended here: also one that
is frozen, which hears no signal but the last.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil

from mlkd_dist.processes.signals import REQUEUE, SAME_SIGNAL, SHOW_STACKS, VERDICTS, handled

# Seconds that the processes have to save, once they are to stop and nobody else waits for them.
GRACE = 300.0
# Seconds that the others have to end by themselves once one of them has failed.
FAULT_GRACE = 5.0
PR_SET_CHILD_SUBREAPER = 36


class Launch:
    """One start of the launcher with `processes` training processes."""

    def __init__(self, command: list[str], environment: dict[str, str], processes: int, told: Path):
        self.processes, self.told = processes, told
        self.asked: float | None = None
        self.ended_by: int | None = None
        self.fault: str | None = None
        # Its processes become ours when it dies before them.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.child = subprocess.Popen(
            command,
            env=environment | {VERDICTS: str(told)},
            # A session of its own, so that a terminal's Ctrl-C comes here alone and the group can
            # be ended as one; USR1 may be sent to all processes of a job, and would kill launchers.
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is not None and now - self.asked <= SAME_SIGNAL:
            return
        second, self.asked = self.asked is not None, now
        # Before all of them are up nothing is there to save.
        if second or len(self.numbers("pid")) < self.processes:
            self.ended_by = number if second else None
            self.end()
        else:
            self.ask()

    def ask(self) -> None:
        """All but those that are ours since the death of their parent, which has told them: hearing
        it much later once more would end them."""
        for number in self.numbers("pid").values():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if psutil.Process(number).ppid() != os.getpid():
                    os.kill(number, signal.SIGUSR1)

    def end(self) -> None:
        """All that the launcher has started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def numbers(self, kind: str) -> dict[int, int]:
        """What each process has told: its pid, or the code with which it ends."""
        found = {}
        for path in self.told.glob(f"*.{kind}"):
            # A file that is just being written is empty.
            if text := path.read_text():
                found[int(path.stem)] = int(text)
        return found

    def alive(self) -> bool:
        """Whether anything that the launcher started still runs."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(self.child.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """Until everything has ended; the exit code of the whole."""
        failed_at = None
        while (code := self.child.poll()) is None:
            now = time.monotonic()
            failed_at = failed_at or (now if self.failed() else None)
            # Once: the launcher may take its time to be gone.
            late = failed_at is not None and now - failed_at > FAULT_GRACE
            if late and self.fault is None:
                self.show_stacks()
                self.say_fault()
                self.end()
            time.sleep(0.1)
        if self.alive():
            self.ask()
        until = time.monotonic() + GRACE
        while self.alive() and time.monotonic() < until:
            time.sleep(0.1)
        # The others may have noticed, and ended, before anything was late.
        if self.fault is None and self.asked is None and self.broke():
            self.say_fault()
        self.end()
        return self.verdict(code)

    def failed(self) -> bool:
        codes = self.numbers("code")
        return bool(self.dead(codes)) or any(c not in (0, 2, REQUEUE) for c in codes.values())

    def dead(self, codes: dict[int, int]) -> list[int]:
        """Processes that ended without a word."""
        return [r for r, pid in self.numbers("pid").items() if r not in codes and not there(pid)]

    def show_stacks(self) -> None:
        """Of processes that hang, while others waited for them; one that is frozen shows none."""
        codes = self.numbers("code")
        hanging = [pid for rank, pid in self.numbers("pid").items() if rank not in codes]
        if self.dead(codes) or not any(self.told.glob("*.lost")):
            return
        for pid in hanging:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SHOW_STACKS)
        time.sleep(1.0 if hanging else 0.0)

    def broke(self) -> bool:
        """Whether a process died, or lost the others; any other end has been explained."""
        return bool(self.dead(self.numbers("code"))) or any(self.told.glob("*.lost"))

    def say_fault(self) -> None:
        self.fault = self.blamed()
        print(f"mlkd: error: {self.fault}", file=sys.stderr, flush=True)

    def blamed(self) -> str:
        """One sentence about a fault, of processes that had time to tell what they know."""
        codes, lost = self.numbers("code"), sorted(p.stem for p in self.told.glob("*.lost"))
        silent = [rank for rank in range(self.processes) if rank not in codes]
        if dead := self.dead(codes):
            why = f"process {listed(dead)} died (of a signal, or for want of memory)"
        elif lost and silent:
            why = (
                f"process {listed(silent)} gave no sign for the seconds of launch.timeout, in "
                f"which process {listed(lost)} waited"
            )
        elif lost:
            why = f"process {listed(lost)} lost contact with the others"
        else:
            why = f"process {listed(sorted(codes))} failed, as said above"
        return f"{why}; all processes are ended. The same command goes on from the last checkpoint."

    def verdict(self, code: int) -> int:
        if self.ended_by is not None:
            return 128 + self.ended_by
        if self.fault is not None:
            return 1
        codes = self.numbers("code")
        if len(codes) == self.processes and len(set(codes.values())) == 1:
            return codes.popitem()[1]
        if self.asked is not None and not codes:
            return REQUEUE
        if code == 0:
            print(
                f"mlkd: error: the launcher reports success, but of {self.processes} processes "
                f"only {len(codes)} came to an end of their own.",
                file=sys.stderr,
            )
            return 1
        return code if code > 0 else 128 - code


def there(pid: int) -> bool:
    """Whether a process runs, frozen ones included; one that its parent has not seen off does
    not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(pid, 0)
        if sys.platform != "linux":
            return True
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def listed(ranks: list[Any]) -> str:
    return ", ".join(map(str, ranks))


def launched(command: list[str], environment: dict[str, str], processes: int) -> int:
    with TemporaryDirectory(prefix="mlkd-") as told:
        launch = Launch(command, environment, processes, Path(told))
        with handled(launch.handle):
            return launch.wait()
