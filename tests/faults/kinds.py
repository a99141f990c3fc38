"""The kinds of faults that a run is to survive: what strikes, where, and what is then found."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from strikes import POINT, STEP, Fault

from faults import folders

SAVE = "mlkd_dist.checkpoint.Checkpoints.save"
STAGE_END = "mlkd_dist.checkpoint.Checkpoints.save_stage_end"
OUTPUTS = "mlkd_dist.evaluate.Evaluator.outputs"
# Of a save within a stage, and of what follows one at a stage's end.
POINTS = ("begun", "synced", "manifest", "folders", "renamed", "latest")
PUBLISHING = ("copied", "export removed", "published")
# Of the nine: within the first step of a stage processes wait for one another as long as it takes.
STEPS, NOT_FIRST = range(1, 9), (1, 2, 3, 5, 6, 7, 8)
# Two checkpoints are there, the newer one within a stage.
TWO_THERE = (7, 8)

Draw = Callable[[Random], list[Fault]]


@dataclass
class Kind:
    name: str
    strikes: Draw | None
    ends: set[int | None]
    """How processes may end that are struck: exit codes; None is one that is frozen or waits for
    one that is, and is ended as the launcher would."""
    damage: Callable[[Path, Random], str] | None = None
    """Done to the run folder before it goes on; says what."""
    again: Draw | None = None
    """What strikes the second start."""
    change: dict[str, Any] = field(default_factory=dict)
    parent: bool = False
    own_cache: bool = False
    skipped: bool = False
    """Compared with a run in which all processes skipped the same step."""


def at_step(do: str, steps: Any = STEPS, ranks: tuple[int, ...] | None = None) -> Draw:
    """Of all processes, of these, or for () of one that is drawn."""

    def draw(seed: Random) -> list[Fault]:
        hit = (seed.randrange(2),) if ranks == () else ranks
        return [Fault(do, STEP, seed.choice(steps), hit)]

    return draw


def at(do: str, where: str, numbers: Any = (1,), ranks: tuple[int, ...] | None = ()) -> Draw:
    def draw(seed: Random) -> list[Fault]:
        hit = (seed.randrange(2),) if ranks == () else ranks
        return [Fault(do, where, seed.choice(numbers), hit)]

    return draw


def at_point(do: str, points: tuple[str, ...], numbers: Any, rank: int) -> Draw:
    def draw(seed: Random) -> list[Fault]:
        return [Fault(do, POINT, seed.choice(numbers), (rank,), seed.choice(points))]

    return draw


def both(*draws: Draw) -> Draw:
    return lambda seed: [fault for draw in draws for fault in draw(seed)]


def cut_off(name: str, damage: Callable[[Path, Random], str]) -> Kind:
    """Killed, and then this happens to its folder."""
    return Kind(name, at_step("kill", TWO_THERE), KILLED, damage)


KILLED, DIED, FROZEN = {-signal.SIGKILL}, {-signal.SIGKILL, 1}, {1, None}
IMPATIENT = {"launch": {"timeout": 3}}
LOADERS = {"data": {"workers": 1}}
BACKGROUND = {"run": {"save_in_background": True}}

KINDS = [
    # Killed
    Kind("kill -9 of the first process", at_step("kill", ranks=(0,)), DIED),
    Kind("kill -9 of another process", at_step("kill", ranks=(1,)), DIED),
    Kind("kill -9 of all processes at once", at_step("kill"), KILLED),
    Kind("kill -9 of the launcher", at_step("kill parent", ranks=(1,)), {75}, parent=True),
    Kind("kill -9 in a save", at_point("kill", POINTS, (1, 2, 3), 0), DIED),
    Kind("kill -9 of another process in a save", at_point("kill", ("synced",), (1, 2, 3), 1), DIED),
    Kind("kill -9 in a save in the background",
         at_point("kill", POINTS, (1, 2, 3), 0), DIED, change=BACKGROUND),
    Kind("kill -9 of another process in a save in the background",
         at_point("kill", ("synced",), (1, 2, 3), 1), DIED, change=BACKGROUND),
    Kind("kill -9 while an old checkpoint is removed",
         at_point("kill", ("set aside",), (1, 2), 0), DIED),
    Kind("kill -9 where a stage ends", at("kill", STAGE_END, (1, 2)), DIED),
    Kind("kill -9 between stages", at("kill after", STAGE_END, (1,), None), KILLED),
    Kind("kill -9 while the student is exported", at_point("kill", PUBLISHING, (1, 2), 0), DIED),
    Kind("kill -9 while data is tokenised",
         at("kill", "mlkd_dist.data.Encoding.rows", (1, 2), (0,)), DIED, own_cache=True),
    Kind("kill -9 while tokenised data is put in place",
         at("kill", "mlkd_dist.data._install", (1, 2), (0,)), DIED, own_cache=True),
    Kind("kill -9 while the student is cut",
         at("kill after", "mlkd_dist.run.starting_student", ranks=(0,)), DIED),
    Kind("kill -9 while the run folder is made",
         at("kill", "pathlib.Path.rename", (1, 2), (0,)), DIED),
    Kind("kill -9 in the first evaluation", at("kill", OUTPUTS), DIED),
    Kind("kill -9 in the last evaluation", at("kill", OUTPUTS, (2, 3)), DIED),
    Kind("kill -9 while the report is written",
         at("kill", "mlkd_dist.evaluate.write_whole", ranks=(0,)), DIED),
    Kind("kill -9 twice", at_step("kill", (2, 3, 4), ()), DIED,
         again=at_step("kill", (5, 6, 7), ())),
    Kind("kill -9 while a checkpoint is verified", at_step("kill", (3, 7)), KILLED,
         again=at("kill", "mlkd_dist.saving.verify.check")),
    Kind("kill -9 while a checkpoint is loaded", at_step("kill", (3, 7)), KILLED,
         again=at("kill", "mlkd_dist.checkpoint.read_shards")),
    Kind("kill -9 of a process that loads data",
         at_step("kill loader", (1, 5), ()), {1}, change=LOADERS),
    Kind("no memory in one process", at_step("no memory", ranks=()), {1}),
    # Asked to stop
    Kind("SIGTERM to one process", at_step("TERM", ranks=()), {75}),
    Kind("SIGUSR1 to all processes", at_step("USR1"), {75}),
    Kind("Ctrl-C to all processes", at_step("INT"), {75}),
    Kind("SIGTERM in a save", at_point("TERM", POINTS, (1, 2), 0), {75}),
    Kind("SIGTERM in an evaluation", at("TERM", OUTPUTS), {75, 1}),
    Kind("the time limit", at_step("late", ranks=()), {75}, change={"run": {"time_limit": 60}}),
    # Frozen, apart
    Kind("a frozen process", at_step("freeze", NOT_FIRST, ()), FROZEN, change=IMPATIENT),
    Kind("a frozen process that loads data", at_step("freeze loader", (1, 5), ()), FROZEN,
         change=IMPATIENT | LOADERS),
    Kind("processes out of step", at_step("apart", ranks=()), {1}),
    # Disks
    Kind("a save that cannot be written by the first process",
         at("full", SAVE, (1, 2, 3), (0,)), {0}),
    Kind("a save that cannot be written by another process",
         at("full", SAVE, (1, 2, 3), (1,)), {0}),
    Kind("a stage's end that cannot be written", at("full", STAGE_END, (1, 2), (0,)), {1}),
    Kind("SIGTERM while nothing can be written",
         both(at_step("TERM", (0, 1)), at("full", SAVE)), {1}),
    # What is found afterwards
    cut_off("a flipped bit in the newest checkpoint", folders.flip),
    cut_off("a newest checkpoint cut short", folders.cut),
    cut_off("a newest checkpoint without one of its files", folders.lose),
    cut_off("a newest checkpoint with a damaged manifest", folders.flip_manifest),
    cut_off("a newest checkpoint without a manifest", folders.lose_manifest),
    cut_off("no LATEST", folders.lose_latest),
    cut_off("a LATEST that points nowhere", folders.point_nowhere),
    cut_off("what an earlier crash has left", folders.litter),
    cut_off("half a line in the log", folders.tear_log),
    cut_off("half an event for TensorBoard", folders.tear_events),
    cut_off("an export half there", folders.halve_export),
    Kind("tokenised data cut short", at_step("kill", TWO_THERE), KILLED,
         folders.cut_cache, own_cache=True),
    # Numbers and rows
    Kind("a loss that is not finite in one process",
         at_step("not finite", ranks=()), {0}, skipped=True),
    Kind("bad rows", None, {0}, change={"data": {"max_bad": 2}}),
]  # fmt: skip
