"""Where the cases of a measurement run, how many of them, and what comes of a group."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conftest import BERT, write_data, write_model
from places import Place
from transformers import AutoModelForSequenceClassification, BertConfig

Thing = TypeVar("Thing")


@dataclass
class Figure:
    """One line of the table, with every case behind it."""

    name: str
    wanted: str
    measured: str
    met: bool
    cases: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Work:
    base: Path
    quick: bool

    def __post_init__(self) -> None:
        bert = BertConfig(**BERT, num_labels=3)
        self.teacher = write_model(self.base / "teacher", bert, AutoModelForSequenceClassification)
        (self.base / "data").mkdir()
        self.data = write_data(self.base / "data")

    @property
    def seeds(self) -> range:
        return range(1 if self.quick else 3)

    def place(self, name: str) -> Place:
        folder = self.base / name
        folder.mkdir()
        return Place(folder, self.teacher, self.data)

    def some(self, things: Sequence[Thing], few: int) -> list[Thing]:
        """All, or spread over them so few where time is short."""
        if not self.quick or len(things) <= few:
            return list(things)
        return [things[i * len(things) // few] for i in range(few)]


def config(place: Place, name: str, seed: int = 0, **changes: Any) -> dict:
    """Two stages at ZeRO 2 with dropout, of two processes with two micro-batches each."""
    found = place.config(name, student__zero_stage=2, student__dropout=True, **changes)
    found["batch"] |= {"micro_batch": 1, "grad_accum": 2}
    found["run"]["seed"] = seed
    return found


def case(place: Place, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case found, with the seconds it took; its files are kept where it failed, and an error
    of the harness itself is a failure."""
    begun = time.monotonic()
    try:
        found = work()
    except Exception as error:
        found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    found = {"case": name} | found | {"seconds": round(time.monotonic() - begun, 1)}
    if found["passed"]:
        shutil.rmtree(place.base / name, ignore_errors=True)
    mark = "ok" if found["passed"] else f"FAILED {found}"
    print(f"  {found['case']}: {mark} ({found['seconds']} s)", flush=True)
    return found


def share(name: str, wanted: str, cases: list[dict[str, Any]]) -> Figure:
    """So many of so many."""
    passed = sum(each["passed"] for each in cases)
    met = bool(cases) and passed == len(cases)
    return Figure(name, wanted, f"{passed} of {len(cases)}", met, cases)


def told(figures: list[Figure]) -> list[dict[str, Any]]:
    return [asdict(figure) for figure in figures]
