"""Bad rows of the data: which they are, how many may be left out, and the file that lists them."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlkd_dist.config import UserError
from mlkd_dist.processes.signals import say
from mlkd_dist.saving.commit import write_whole
from mlkd_dist.tasks import BadRow

# Of a row in the list, characters; of the rows of an error, how many are named.
SHOWN, NAMED = 300, 3
# Characters of a reason in a sentence that names several.
REASON = 160


class Bad(NamedTuple):
    number: int
    """Of its line, or of the row where a source has no lines, from 1."""
    wrong: str
    remedy: str
    row: str


@dataclass
class Sieve:
    """What is bad in one source. Where it is `strict`, the first bad row is an error."""

    source: str
    unit: str = "line"
    strict: bool = True
    rows: int = 0
    bad: dict[int, Bad] = field(default_factory=dict)

    def refuse(self, number: int, error: BadRow, row: str) -> None:
        found = Bad(number, error.wrong, error.remedy, row[:SHOWN])
        if self.strict:
            raise UserError(self.sentence(found))
        self.bad[number] = found

    def sentence(self, found: Bad) -> str:
        return (
            f"{self.source!r}, {self.unit} {found.number}: {found.wrong}; {found.remedy}, or have "
            f"such rows left out with data.max_bad."
        )

    def first(self) -> Bad:
        return self.bad[min(self.bad)]

    def named(self) -> str:
        """The first bad rows with their reasons, in one line."""
        numbers = sorted(self.bad)
        said = [f"{self.unit} {n}: {cut(self.bad[n].wrong, REASON)}" for n in numbers[:NAMED]]
        return "; ".join(said) + (f"; and {len(numbers) - NAMED} more" * (len(numbers) > NAMED))

    def save(self, path: Path) -> None:
        """Without the name of the source: what it holds may also lie elsewhere."""
        path.write_text(json.dumps({"rows": self.rows, "bad": list(self.bad.values())}))

    def load(self, path: Path) -> None:
        found = json.loads(path.read_text())
        self.rows, self.bad = found["rows"], {each[0]: Bad(*each) for each in found["bad"]}


@dataclass
class Quarantine:
    """The bad rows of all sources of a run."""

    max_bad: float = 0
    """Of each source: a share of its rows if under 1, else a number of rows; 0: none."""
    sieves: dict[str, Sieve] = field(default_factory=dict)
    """By the setting that names the source."""

    def sieve(self, source: str, unit: str) -> Sieve:
        return Sieve(source, unit, strict=self.max_bad == 0)

    def add(self, key: str, found: Sieve) -> None:
        """One part of a source may be tokenised before, another be new."""
        ours = self.sieves.setdefault(key, self.sieve(found.source, found.unit))
        ours.rows, ours.bad = found.rows, ours.bad | found.bad

    def check(self, folder: Path, empty: str | None = None) -> None:
        """UserError where there are more bad rows than data.max_bad, or the source that is named as
        `empty` has no good one left; they are then listed in `folder`."""
        for key, sieve in self.sieves.items():
            if not sieve.bad:
                continue
            if self.max_bad == 0:
                raise UserError(sieve.sentence(sieve.first()))
            bad, rows = len(sieve.bad), sieve.rows
            if key == empty or bad == rows:
                said, remedy = "which leaves no row to use", "correct them"
            elif (bad / rows if self.max_bad < 1 else bad) > self.max_bad:
                said = f"more than data.max_bad allows ({self.max_bad:g})"
                remedy = "correct them or raise data.max_bad"
            else:
                continue
            raise UserError(
                f"{key}: {bad} of the {rows} rows of {sieve.source!r} are bad, {said} "
                f"({sieve.named()}); {remedy}; all are listed in {str(self.list_in(folder))!r}."
            )

    @property
    def counts(self) -> dict[str, int]:
        return {key: len(sieve.bad) for key, sieve in self.sieves.items()}

    def tell(self, path: Path) -> None:
        """A sentence for each source with bad rows, which are listed in `path`."""
        for key, sieve in self.sieves.items():
            if sieve.bad:
                say(
                    f"{key}: {len(sieve.bad)} of the {sieve.rows} rows of {sieve.source!r} are bad "
                    f"and left out ({sieve.named()}); all are listed in {str(path)!r}."
                )

    def listed(self) -> str:
        """JSON lines, in the order of the data."""
        rows: list[dict[str, Any]] = [
            {
                "data": key,
                "source": sieve.source,
                sieve.unit: number,
                "reason": sieve.bad[number].wrong,
                "content": sieve.bad[number].row,
            }
            for key, sieve in self.sieves.items()
            for number in sorted(sieve.bad)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def list_in(self, folder: Path) -> Path:
        """The list as a file of a folder that several runs share, named by what it holds."""
        text = self.listed()
        path = folder / f"quarantine-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        return path


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
