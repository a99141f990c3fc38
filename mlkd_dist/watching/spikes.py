"""Loss spikes: what one is, and how a run goes back to before it."""

from collections import deque
from statistics import median
from typing import Any

from mlkd_dist.checkpoint import Checkpoints, Position
from mlkd_dist.config import RewindConfig, StageConfig
from mlkd_dist.metrics import Line, finite
from mlkd_dist.processes.signals import say
from mlkd_dist.saving import commit, verify
from mlkd_dist.saving.commit import Rejected
from mlkd_dist.watching.watch import Diverged


class Spikes:
    """The losses that one stage has logged, which are the same on all processes.

    A spike is a logged loss/total, the mean over the steps of its line, of more than `factor` times
    the median of those of the last `window` steps. Nothing is one before so many were logged, since
    the stage began or since other losses or layers count. Lines without a finite loss, of steps
    that were skipped, are left out.
    """

    def __init__(self, settings: RewindConfig, log_every: int):
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=max(1, settings.window // log_every))
        self.counted: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.counted = state["counted"]

    def usual(self, line: Line) -> float | None:
        """What a loss is usually, where this line's is a spike; else the line is one of those that
        later ones are compared with."""
        if line.counted != self.counted:
            self.losses.clear()
            self.counted = line.counted
        if not finite(line.loss):
            return None
        full = len(self.losses) == self.losses.maxlen
        usual = median(self.losses) if full else None
        if full and 0 < self.settings.factor * usual < line.loss:
            return usual
        self.losses.append(line.loss)
        return None


def go_back(
    at: Position, line: Line, usual: float, settings: RewindConfig, checkpoints: Checkpoints
) -> Position:
    """Where the run goes on after a spike in the line that ends at `at`: at the newest sound
    checkpoint before its first step, with data that come after those of its last one. That is one
    of those that a run which was never interrupted has too. Raises Diverged where there is none, or
    the run has been there too often; all processes call this.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311) go back about 100 steps and skip 200 to 500
    batches, those before the spike included. Our reading: those since the checkpoint.
    """
    first = at.done - line.steps
    where = f"the loss of steps {first + 1} to {at.done} is {line.loss:.4g}, usually {usual:.4g}"
    done = len(checkpoints.rewinds)
    if done >= settings.at_most:
        last = commit.latest(checkpoints.root)
        raise Diverged(
            f"{where}, and the run went back {done} times already (run.rewind.at_most); the last "
            f"checkpoint is {last or 'none'}. Lower optim.lr, or look at the data of these steps."
        )
    for name in checkpoints.regular(at, first):
        try:
            manifest = verify.verified(checkpoints.root, checkpoints.world, name)
        except Rejected as error:
            say(f"warning: checkpoint {name} is not gone back to: {error}")
            continue
        skipped = at.done - manifest["step"]
        say(
            f"{where}: going back to {name}, and on without the data of these {skipped} steps "
            f"({done + 1} of at most {settings.at_most} times)."
        )
        found = {"stage": at.stage, "to": manifest["step"], "spike": at.done, "skipped": skipped}
        return checkpoints.go_back(name, manifest, found | {"loss": line.loss, "usual": usual})
    raise Diverged(
        f"{where}, and there is no checkpoint before them to go back to; set run.checkpoint_every "
        f"lower, or look at the data of these steps."
    )


def rows(rewinds: list[dict[str, Any]], stages: list[StageConfig]) -> list[dict[str, Any]]:
    """For metrics.jsonl: each as if it were logged before the step that the run went back to, by
    itself or, later, further."""
    return [
        {
            "step": min(later["to"] for later in rewinds[i:]) - 1,
            "stage": stages[found["stage"]].name,
            **{f"rewind/{key}": found[key] for key in ("to", "spike", "skipped", "loss", "usual")},
        }
        for i, found in enumerate(rewinds)
    ]
