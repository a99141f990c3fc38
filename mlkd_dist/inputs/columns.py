"""What is wanted of the rows of a source, and what is wrong with one."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mlkd_dist.rules.allowed import UserError, nearest
from mlkd_dist.tasks import BROKEN, BadRow

# The column that says where in its source a row stands, from 1.
LINE = "__line__"


@dataclass(frozen=True)
class Columns:
    """The wanted columns of one source, and what is wrong with the values of a row."""

    source: str
    names: list[str]
    label: str | None = None
    label_keys: tuple[str, ...] = ()  # where the label holds keys and values
    keys: dict[str, str] = field(default_factory=dict)  # column -> what sets it, where a task says
    longest: dict[str, int] = field(default_factory=dict)  # column -> characters it may have
    check: Callable[[dict[str, Any]], None] = lambda row: None

    @classmethod
    def of(cls, source: str, task: Any) -> "Columns":
        """What a task wants of a source."""
        said = {
            name: getattr(task, name)
            for name in ("label", "label_keys", "keys", "longest", "check")
            if hasattr(task, name)
        }
        return cls(source, list(task.columns), **said)

    def key(self, name: str) -> str:
        if name in self.keys:
            return self.keys[name]
        if name == self.label:
            return "data.label"
        first = next(text for text in self.names if text != self.label)
        return "data.text" if name == first else "data.text_pair"

    def chats(self, name: str) -> bool:
        """Whether a column holds lists of messages, which are passed on as JSON."""
        return self.keys.get(name) == "data.messages"

    def missing(self, name: str, given: Iterable[str]) -> BadRow:
        given = list(given)
        return BadRow(
            f"there is no column {name!r}{nearest(name, given)}, but: "
            f"{', '.join(given) or 'nothing'}",
            f"set {self.key(name)} to the column's name",
        )

    def wrong(self, name: str, held: str) -> BadRow:
        wanted = "a label" if name == self.label else "text"
        wanted = "a list of messages" if self.chats(name) else wanted
        return BadRow(
            f"column {name!r} holds {held}, not {wanted}",
            f"correct the data or set {self.key(name)} to another column",
        )

    def whole(self, error: BadRow) -> UserError:
        """Where it is so of all rows alike."""
        return UserError(f"{self.source!r}: {error}")

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is wanted of a row. Raises BadRow."""
        found = {name: self.value(row, name) for name in self.names}
        self.check(found)
        return found

    def value(self, row: dict[str, Any], name: str) -> Any:
        if name not in row:
            raise self.missing(name, row)
        value = row[name]
        if name == self.label:
            return self.checked_label(value)
        if self.chats(name) and isinstance(value, list):
            value = json.dumps(value)
        if not isinstance(value, str):
            raise self.wrong(name, shown(value))
        self.check_text(name, value)
        return value

    def checked_label(self, value: Any) -> Any:
        if self.label_keys:
            if not isinstance(value, dict) or not value.keys() >= set(self.label_keys):
                raise self.wrong(self.label, shown(value))
            return {key: value[key] for key in self.label_keys}
        if not isinstance(value, str | int | float):
            raise self.wrong(self.label, shown(value))
        if problem := number_problem(value):
            raise self.wrong(self.label, f"{shown(value)}, {problem}")
        return value

    def check_text(self, name: str, text: str) -> None:
        if found := BROKEN.search(text):
            what = "a NUL character" if found[0] == "\0" else "half a surrogate pair"
            raise self.wrong(name, what)
        # An answer may follow nothing.
        if not text.strip() and self.key(name) != "data.prompt":
            raise BadRow(
                f"column {name!r} is empty" + (", but for white space" if text else ""),
                "fill it or remove the row",
            )
        longest = self.longest.get(name, len(text))
        if len(text) > longest:
            raise BadRow(
                f"column {name!r} has {len(text)} characters, and {longest} is the most",
                "cut it in pieces or remove the row",
            )


def shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def number_problem(value: Any) -> str | None:
    """JSON's truth values are numbers to Python, and its numbers have no end."""
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number that 64 bits do not hold"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number without end"
    return None
