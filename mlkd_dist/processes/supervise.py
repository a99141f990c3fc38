"""`mlkd supervise`: a run that is started again after whatever ends it, as long as that helps."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlkd_dist.config import Config
from mlkd_dist.finetune import finetune_config
from mlkd_dist.processes.signals import REQUEUE, handled
from mlkd_dist.saving import commit

# Starts in a row, without a new checkpoint, after which another one would end the same way.
FRUITLESS = 3
# Seconds before a start that follows a failure; what failed may need a moment to be there again.
PAUSE = 5.0


@dataclass
class Supervisor:
    """Starts `command` until it is done, is refused, is told to stop, or does not get on."""

    command: list[str]
    restarts: int
    """How often it is started again at most."""
    progress: Callable[[], int]
    """Steps in checkpoints."""
    finished: Callable[[], bool]
    """Whether the run says of itself that it is done."""
    pause: float = PAUSE
    child: subprocess.Popen | None = None
    asked: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def run(self) -> int:
        with handled(self.handle):
            return self.watch()

    def watch(self) -> int:
        restarts = fruitless = 0
        best = self.progress()
        while True:
            code = self.start()
            now = self.progress()
            fruitless = 0 if now > best else fruitless + 1
            reason = self.reason_to_stop(code, restarts, fruitless)
            if reason is not None:
                say(f"{reason} (exit code {code}, {restarts} restarts, {now} steps in checkpoints)")
                # 0 is said only of a run that is done.
                return code or int(not self.finished())
            restarts += 1
            made = f"{now - best} steps further" if now > best else "no further than before"
            say(f"the run ended with code {code}, {made}; restart {restarts} of {self.restarts}.")
            best = max(best, now)
            if code != REQUEUE:
                self.rest()

    def start(self) -> int:
        if self.asked is not None:
            return 128 + self.asked
        # A session of its own: what a terminal sends to all comes here alone, and is passed on.
        self.child = subprocess.Popen(self.command, start_new_session=True)
        if self.asked is not None:
            # It came while the child was made.
            self.child.send_signal(self.asked)
        # A wait without end would hold back a signal that another thread received.
        while (code := self.child.poll()) is None:
            time.sleep(0.1)
        return code if code >= 0 else 128 - code

    def reason_to_stop(self, code: int, restarts: int, fruitless: int) -> str | None:
        if self.asked is not None:
            return "stopped, as it was asked to"
        if code == 0 and self.finished():
            return "done"
        if code == 2:
            return "not started again, since what is wrong is said above and will not pass"
        if restarts >= self.restarts:
            return "given up: launch.restarts are used up"
        if fruitless >= FRUITLESS:
            return f"given up: {FRUITLESS} starts in a row made no new checkpoint"
        return None

    def rest(self) -> None:
        until = time.monotonic() + self.pause
        while self.asked is None and time.monotonic() < until:
            time.sleep(0.1)


def supervise(config: Config, path: str, settings: list[str]) -> int:
    """`mlkd distill` of this config, again and again."""
    folders = [Path(config.run.dir)]
    if config.teacher.finetune is not None:
        folders.append(Path(finetune_config(config).run.dir))

    def progress() -> int:
        return sum(steps(folder / "checkpoints") for folder in folders)

    def finished() -> bool:
        return (folders[0] / "report.json").exists()

    command = [sys.executable, "-m", "mlkd_dist.cli", "distill", path, *settings]
    return Supervisor(command, config.launch.restarts, progress, finished).run()


def steps(root: Path) -> int:
    """Of the newest checkpoint that is whole."""
    return max((int(name.removeprefix("step-")) for name in commit.names(root)), default=0)


def say(text: str) -> None:
    print(f"mlkd: supervise: {text}", file=sys.stderr, flush=True)
