"""What a person names as data: a file, a hub name or the built-in text; read strictly."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlkd_dist.config import UserError, resolve_path
from mlkd_dist.inputs import builtin_text
from mlkd_dist.inputs.columns import LINE, Columns
from mlkd_dist.inputs.quarantine import SHOWN, Sieve
from mlkd_dist.tasks import BadRow

datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()

BUILTIN = "builtin:python_docs"
ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
# Told apart from hub names, which may hold dots too ("owner/name-2.5").
OTHER_ENDINGS = ".csv .tsv .arrow .feather .gz .zst .xz .bz2 .zip .tar .pkl .xml .md .yaml".split()
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?"
)
ROWS_AT_ONCE = 10_000
LONGEST_LINE = 2**27


@dataclass(frozen=True)
class HubName:
    name: str
    config: str | None
    split: str


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


def unit(source: str) -> str:
    """How its rows are counted."""
    place = locate(source)
    return "line" if isinstance(place, Path) and place.suffix != ".parquet" else "row"


def read(wanted: Columns, sieve: Sieve) -> datasets.Dataset:
    """The good rows of a source: the wanted columns, text everywhere but in the label, and LINE.
    The others go into `sieve`."""
    source, place = wanted.source, locate(wanted.source)
    if isinstance(place, HubName):
        return _checked(_hub(place, source), wanted, sieve)
    if place == BUILTIN:
        text = datasets.Dataset(pa.table({"text": builtin_text.passages()}))
        return _checked(text, wanted, sieve)
    if place.suffix == ".parquet":
        return _checked(datasets.Dataset(_parquet(place, source)), wanted, sieve)
    if place.suffix == ".txt":
        for name in wanted.names:
            if name != "text":
                raise wanted.whole(wanted.missing(name, ["text"]))
    return datasets.Dataset(_table(place, wanted, sieve))


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


def _table(path: Path, wanted: Columns, sieve: Sieve) -> pa.Table:
    tables, rows = [], {name: [] for name in (*wanted.names, LINE)}

    def flush() -> None:
        tables.append(pa.table(rows))
        for values in rows.values():
            values.clear()

    for number, line in _lines(path, sieve):
        try:
            row = {"text": line} if path.suffix == ".txt" else _parse(line)
            for name, value in wanted.values(row).items():
                rows[name].append(value)
        except BadRow as error:
            sieve.refuse(number, error, line)
            continue
        rows[LINE].append(number)
        if len(rows[LINE]) == ROWS_AT_ONCE:
            flush()
    flush()
    if not sieve.rows:
        what = "one text" if path.suffix == ".txt" else "one JSON object"
        raise UserError(f"{wanted.source!r} is empty; it must hold {what} per line.")
    return pa.concat_tables(tables, promote_options="permissive")


def _lines(path: Path, sieve: Sieve) -> Iterator[tuple[int, str]]:
    """Non-blank lines, numbered. Only a newline ends one: text may hold U+2028 and such."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            raw = file.readline(LONGEST_LINE)
            if not raw:
                return
            whole = raw.endswith(b"\n") or len(raw) < LONGEST_LINE
            # A file that has lost its line ends need not fit into memory.
            while not whole and (rest := file.readline(LONGEST_LINE)):
                whole = rest.endswith(b"\n")
            try:
                line = _decoded(raw, number)
            except BadRow as error:
                sieve.rows += 1
                sieve.refuse(number, error, raw[: 4 * SHOWN].decode(errors="backslashreplace"))
                continue
            if line:
                sieve.rows += 1
                yield number, line


def _decoded(raw: bytes, number: int) -> str:
    if len(raw) >= LONGEST_LINE:
        raise BadRow(f"it has {LONGEST_LINE} bytes or more", "end each row with a newline")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRow(f"it is not UTF-8 text ({error.reason})", "write the file as UTF-8") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # The decoder counts lines too, always from 1: only its column says something here.
        found = isinstance(error, json.JSONDecodeError)
        reason = (
            f"{error.msg.removesuffix(' at')} at character {error.colno}" if found else str(error)
        )
        raise BadRow(
            f"it is not JSON ({reason}): {line[:60]!r}", "write one JSON object per line"
        ) from error
    if not isinstance(row, dict):
        raise BadRow(
            f"it is JSON but not an object: {line[:60]!r}", "write one JSON object per line"
        )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


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


def _checked(found: datasets.Dataset, wanted: Columns, sieve: Sieve) -> datasets.Dataset:
    if not len(found):
        raise UserError(f"{wanted.source!r} is empty.")
    for name in wanted.names:
        if name not in found.column_names:
            raise wanted.whole(wanted.missing(name, found.column_names))
    found = found.select_columns(wanted.names)
    for name in wanted.names:
        if wanted.chats(name):
            found = _chats_as_text(found, name)
        column = found.data.column(name)
        if name != wanted.label and not _holds_text(column) and column.null_count < len(column):
            held = f"{column.type} ({str(column[0].as_py())[:60]})"
            raise wanted.whole(wanted.wrong(name, held))
    sieve.rows = len(found)
    numbered = found.add_column(LINE, np.arange(1, len(found) + 1))
    good = np.fromiter(_good(numbered, wanted, sieve), dtype=np.int64)
    return numbered if len(good) == len(found) else numbered.select(good)


def _holds_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _good(found: datasets.Dataset, wanted: Columns, sieve: Sieve) -> Iterator[int]:
    """Which rows are good."""
    broken = {i for name in wanted.names for i in _not_utf8(found.data.column(name))}
    for i in sorted(broken):
        sieve.refuse(i + 1, BadRow("it is not UTF-8 text", "write the file as UTF-8"), "")
    sound = found.select([i for i in range(len(found)) if i not in broken]) if broken else found
    for batch in sound.iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            number = row.pop(LINE)
            try:
                wanted.values(row)
            except BadRow as error:
                sieve.refuse(number, error, json.dumps(row, default=str))
            else:
                yield number - 1


def _not_utf8(column: pa.ChunkedArray) -> Iterator[int]:
    """Rows whose bytes are no text, which parquet files may hold all the same."""
    if not _holds_text(column):
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for i, value in enumerate(column.cast(pa.large_binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError:
                yield i


def _chats_as_text(found: datasets.Dataset, name: str) -> datasets.Dataset:
    kind = found.data.column(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return found
    texts = [None if chat is None else json.dumps(chat) for chat in found[name]]
    table = found.data.table
    return datasets.Dataset(table.set_column(table.column_names.index(name), name, [texts]))
