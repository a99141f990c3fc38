"""What a person names as data: a file, a hub name or the built-in text; read strictly."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlkd_dist import builtin_text
from mlkd_dist.config import UserError, nearest, resolve_path

datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()

BUILTIN = "builtin:python_docs"
ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
# Told apart from hub names, which may hold dots too ("owner/name-2.5").
OTHER_ENDINGS = ".csv .tsv .arrow .feather .gz .zst .xz .bz2 .zip .tar .pkl .xml .md .yaml".split()
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?"
)
SURROGATE = re.compile("[\ud800-\udfff]")
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class HubName:
    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Columns:
    """The wanted columns of one source, and the sentences about what is wrong with them."""

    source: str
    names: list[str]
    label: str | None
    structured_label: bool = False
    keys: dict[str, str] = field(default_factory=dict)  # column -> what sets it, where a task says

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

    def missing(self, name: str, given: Iterable[str], place: str = "") -> UserError:
        given = list(given)
        return UserError(
            f"{self.source!r}{place}: there is no column {name!r}{nearest(name, given)}; there is: "
            f"{', '.join(given) or 'nothing'}. Set {self.key(name)} to the column's name."
        )

    def wrong(self, name: str, place: str, held: str) -> UserError:
        wanted = "a label" if name == self.label else "text"
        wanted = "a list of messages" if self.chats(name) else wanted
        return UserError(
            f"{self.source!r}, {place}: column {name!r} holds {held}, not {wanted}; "
            f"correct the data or set {self.key(name)} to another column."
        )


def locate(source: str) -> Path | HubName | str:
    """Where a source is: a file, a name on the hub, or BUILTIN."""
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise UserError(f"{source!r}: the only built-in text is {BUILTIN!r}.")
        return source
    path = Path(resolve_path(source)).expanduser()
    if path.is_dir():
        raise UserError(f"{source!r} is a folder; give one file that ends in {_either(ENDINGS)}.")
    hub = HUB_NAME.fullmatch(source)
    if path.exists() or hub is None or path.suffix in (*ENDINGS, *OTHER_ENDINGS):
        if path.suffix not in ENDINGS:
            raise UserError(f"{source!r}: the file name must end in {_either(ENDINGS)}.")
        if not path.exists():
            raise UserError(
                f"{source!r}: there is no such file (looked in {path.parent.absolute()})."
            )
        return path.resolve()
    return HubName(hub["name"], hub["config"], hub["split"] or "train")


def read(
    source: str,
    columns: list[str],
    label: str | None = None,
    structured_label: bool = False,
    keys: dict[str, str] | None = None,
) -> datasets.Dataset:
    """The wanted columns of a source: no nulls, and text everywhere but in `label`, which holds
    text or numbers, or keys and values."""
    place = locate(source)
    wanted = Columns(source, list(columns), label, structured_label, keys or {})
    if isinstance(place, Path) and place.suffix in (".jsonl", ".json"):
        return datasets.Dataset(_jsonl(place, wanted))
    if isinstance(place, HubName):
        found = _hub(place, source)
    elif place == BUILTIN:
        found = datasets.Dataset(pa.table({"text": builtin_text.passages()}))
    elif place.suffix == ".txt":
        found = datasets.Dataset(_txt(place, source))
    else:
        found = datasets.Dataset(_parquet(place, source))
    return _checked(found, wanted)


def fingerprint(source: str) -> str:
    """Names the content of a source without reading its rows."""
    place = locate(source)
    if isinstance(place, HubName):
        return _hub(place, source)._fingerprint
    if place == BUILTIN:
        return builtin_text.fingerprint()
    with place.open("rb") as file:
        # The ending says how the bytes are read.
        return place.suffix + hashlib.file_digest(file, "sha256").hexdigest()


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _jsonl(path: Path, wanted: Columns) -> pa.Table:
    tables, rows = [], {name: [] for name in wanted.names}

    def flush() -> None:
        tables.append(pa.table(rows))
        for values in rows.values():
            values.clear()

    kind = None
    for number, line in _lines(path, wanted.source):
        row = _parse(line, number, wanted.source)
        for name in wanted.names:
            rows[name].append(_value(row, name, wanted, f"line {number}"))
        if wanted.label is not None:
            kind = _same_kind(kind, row[wanted.label], wanted, f"line {number}")
        if len(rows[wanted.names[0]]) == ROWS_AT_ONCE:
            flush()
    flush()
    table = pa.concat_tables(tables, promote_options="permissive")
    if not len(table):
        raise UserError(f"{wanted.source!r} is empty; it must hold one JSON object per line.")
    return table


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Non-blank lines, numbered. Only a newline ends one: text may hold U+2028 and such."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{source!r}, line {number} is not UTF-8 text ({error.reason})."
                ) from error
            if line.strip():
                yield number, line.strip()


def _parse(line: str, number: int, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # The decoder counts lines too, always from 1: only its column says something here.
        found = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg} at character {error.colno}" if found else str(error)
        raise UserError(
            f"{source!r}, line {number} is not JSON ({reason}): {line[:60]!r}; "
            "write one JSON object per line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{source!r}, line {number} is JSON but not an object: {line[:60]!r}; "
            "write one JSON object per line."
        )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _value(row: dict[str, Any], name: str, wanted: Columns, place: str) -> Any:
    if name not in row:
        raise wanted.missing(name, row, f", {place}")
    value = row[name]
    if wanted.chats(name) and isinstance(value, list):
        value = json.dumps(value)
    kinds = dict if wanted.structured_label else str | int | float
    if not isinstance(value, str if name != wanted.label else kinds):
        raise wanted.wrong(name, place, json.dumps(value)[:60])
    if problem := _number_problem(value):
        raise wanted.wrong(name, place, f"{json.dumps(value)[:60]}, {problem}")
    if isinstance(value, str) and SURROGATE.search(value):
        raise wanted.wrong(name, place, "half a surrogate pair")
    return value


def _number_problem(value: Any) -> str | None:
    """JSON's truth values are numbers to Python, and its numbers have no end."""
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number that 64 bits do not hold"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number without end"
    return None


def _same_kind(kind: type | None, label: Any, wanted: Columns, place: str) -> type:
    found = str if isinstance(label, str) else float
    if kind not in (None, found):
        earlier = "text" if kind is str else "numbers"
        raise wanted.wrong(wanted.label, place, f"{label!r} where earlier lines hold {earlier}")
    return found


def _txt(path: Path, source: str) -> pa.Table:
    texts = pa.array((line for _, line in _lines(path, source)), type=pa.large_string())
    return pa.table({"text": texts})


def _parquet(path: Path, source: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"{source!r} is not a parquet file: {_one_line(error)}") from error


def _hub(hub: HubName, source: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(hub.name, hub.config, split=hub.split)
    # The hub client, the builder and the network each raise types of their own.
    except Exception as error:
        raise UserError(
            f"{source!r}: there is no such file here, and the hub data set {hub.name!r} "
            f"(config {hub.config or 'default'}, split {hub.split}) could not be had: "
            f"{_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def _checked(found: datasets.Dataset, wanted: Columns) -> datasets.Dataset:
    if not len(found):
        raise UserError(f"{wanted.source!r} is empty.")
    for name in wanted.names:
        if name not in found.column_names:
            raise wanted.missing(name, found.column_names)
    found = found.select_columns(wanted.names)
    for name in wanted.names:
        if wanted.chats(name):
            found = _chats_as_text(found, name)
        column = found.data.column(name)
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py() + 1
            raise wanted.wrong(name, f"row {row}", "null")
        if name != wanted.label and not text:
            raise wanted.wrong(name, "row 1", f"{column.type} ({str(column[0].as_py())[:60]})")
    return found


def _chats_as_text(found: datasets.Dataset, name: str) -> datasets.Dataset:
    kind = found.data.column(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return found
    texts = [None if chat is None else json.dumps(chat) for chat in found[name]]
    table = found.data.table
    return datasets.Dataset(table.set_column(table.column_names.index(name), name, [texts]))
