"""From a source to tokenised rows: read, split, tokenised once and kept."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import tokenizers
import transformers

from mlkd_dist.config import UserError
from mlkd_dist.inputs.columns import Columns
from mlkd_dist.inputs.quarantine import Quarantine, Sieve
from mlkd_dist.inputs.selection import first_rows, good_rows, split
from mlkd_dist.inputs.sources import fingerprint, locate, read, unit
from mlkd_dist.tasks import BadRow

# Raised when the meaning of a cached row changes.
FORMAT = 3
# Of an entry of the cache: the bad rows that it was made without.
BAD_ROWS = "bad_rows.json"
# The good rows of a source, and what became of the others.
Raw = tuple[datasets.Dataset, Sieve]


class Task(Protocol):
    """What this file needs of a task; where data is labelled it also has `label`, the column."""

    columns: list[str]
    """Raw columns wanted: the text, the second text if there is one, the label if there is one."""

    def check(self, row: dict[str, Any]) -> None: ...

    def settings(self) -> dict[str, Any]: ...

    def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]: ...


def prepare(
    train: str,
    validation: str | None,
    validation_fraction: float,
    task: Task,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None,
    train_rows: int | None = None,
    quarantine: Quarantine | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Tokenised (train, validation), from the cache where it was tokenised before. Bad rows go into
    `quarantine`; without one, the first is an error."""
    if validation is not None and locate(validation) == locate(train):
        raise UserError(
            f"data.validation is the training data ({validation!r}); leave data.validation empty "
            "to hold out data.validation_fraction of the training rows, or name other data."
        )
    quarantine = Quarantine() if quarantine is None else quarantine
    folder = cache_folder(cache_dir)
    sources = {"data.train": train, "data.validation": validation}

    def raw(key: str) -> Raw:
        sieve = quarantine.sieve(sources[key], unit(sources[key]))
        found = read(Columns.of(sources[key], task), sieve)
        quarantine.add(key, sieve)
        # Before the rest is tokenised in vain.
        quarantine.check(folder)
        return found, sieve

    # Raw rows are split, so that every tokenizer and max_length holds out the same ones.
    @cache
    def parts() -> tuple[Raw, Raw]:
        found, sieve = raw("data.train")
        ours, held_out = split(found, validation_fraction)
        return (ours, sieve), (held_out, sieve)

    def tokenised(
        key: str, part: str, rows: Callable[[], Raw], count: int | None = None
    ) -> datasets.Dataset:
        if count is not None:
            part = f"{count} rows, {part}"
        entry = folder / _key([fingerprint(sources[key]), part], task, tokenizer, max_length)
        sieve = quarantine.sieve(sources[key], unit(sources[key]))
        found = _load(entry, sieve)
        if found is None:
            encode = Encoding(task, tokenizer, max_length, count)
            found = _through_cache(entry, rows, encode, sieve)
        quarantine.add(key, sieve)
        if found is None:
            quarantine.check(folder, empty=key)
        return found

    if validation is not None:
        found = (
            tokenised("data.train", "all", lambda: raw("data.train"), train_rows),
            tokenised("data.validation", "all", lambda: raw("data.validation")),
        )
    else:
        ours, theirs = f"without {validation_fraction}", f"held out {validation_fraction}"
        found = (
            tokenised("data.train", ours, lambda: parts()[0], train_rows),
            tokenised("data.train", theirs, lambda: parts()[1]),
        )
    quarantine.check(folder)
    return found


def _key(content: list[str], task: Task, tokenizer: Any, max_length: int) -> str:
    """Names all that the tokenised rows depend on."""
    described = {
        "content": content,
        "columns": task.columns,
        "task": task.settings(),
        "tokenizer": describe_tokenizer(tokenizer),
        "max_length": max_length,
        "versions": [FORMAT, transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def describe_tokenizer(tokenizer: Any) -> list[Any]:
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by the last call of the tokenizer; not part of what it is.
        model.update(truncation=None, padding=None)
    else:
        model = tokenizer.get_vocab()
    sides = [tokenizer.truncation_side, tokenizer.padding_side]
    names = sorted(tokenizer.model_input_names)
    return [type(tokenizer).__name__, model, tokenizer.special_tokens_map, sides, names]


def cache_folder(cache_dir: str | None) -> Path:
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("MLKD_CACHE") or f"{home}/mlkd_dist"
    return Path(cache_dir).expanduser()


@dataclass
class Encoding:
    """From raw rows to tokens: of all good rows, or of the `count` with the smallest hashes."""

    task: Task
    tokenizer: Any
    max_length: int
    count: int | None

    def rows(self, batch: dict[str, list]) -> dict[str, list]:
        return self.task.encode(batch, self.tokenizer, self.max_length)

    def __call__(
        self, raw: datasets.Dataset, sieve: Sieve, path: Path, name: str
    ) -> datasets.Dataset:
        """What a bad row stands among does not matter: the result is that of the good ones."""

        def encoded(rows: datasets.Dataset) -> datasets.Dataset:
            return rows.map(
                self.rows,
                batched=True,
                remove_columns=rows.column_names,
                cache_file_name=str(path),
                # Else datasets pickles task and tokenizer to name a cache file that nobody reads.
                new_fingerprint=name,
            )

        try:
            return encoded(raw if self.count is None else first_rows(raw, self.count))
        except BadRow:
            return encoded(good_rows(raw, self.count, self.rows, sieve))


def _through_cache(
    entry: Path, rows: Callable[[], Raw], encode: Encoding, sieve: Sieve
) -> datasets.Dataset | None:
    """None where no row is good."""
    raw, found = rows()
    sieve.rows, sieve.bad = found.rows, dict(found.bad)
    work = entry.parent / f".{entry.name[:16]}-{uuid.uuid4().hex}"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"tokenised data cannot be written to {str(entry.parent)!r} ({error.strerror}); "
            "set data.cache or $MLKD_CACHE to a folder that can be written."
        ) from error
    try:
        encoded = encode(raw, sieve, work / "encoded.arrow", entry.name[:32])
        if not len(encoded):
            return None
        encoded.save_to_disk(work / "entry")
        sieve.save(work / "entry" / BAD_ROWS)
        _install(work / "entry", entry, sieve)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return datasets.load_from_disk(entry)


def _install(made: Path, entry: Path, sieve: Sieve) -> None:
    """Renamed in one go: who looks sees no entry or a whole one, whichever writer was first."""
    try:
        made.rename(entry)
    except OSError:
        if _load(entry, sieve) is None:
            shutil.rmtree(entry, ignore_errors=True)
            made.rename(entry)


def _load(entry: Path, sieve: Sieve) -> datasets.Dataset | None:
    """An entry that is whole; its bad rows go into `sieve`."""
    try:
        found = datasets.load_from_disk(entry)
        sieve.load(entry / BAD_ROWS)
        return found
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
