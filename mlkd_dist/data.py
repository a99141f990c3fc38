"""From a source to the micro-batches of a step: read, split, tokenise once, sample."""

import hashlib
import json
import os
import shutil
import signal
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch
import transformers

from mlkd_dist.config import UserError
from mlkd_dist.sources import fingerprint, locate, read

# Raised when the meaning of a cached row changes.
FORMAT = 1
# Seconds that a loader process may take for one micro-batch.
LOADER_TIMEOUT = 300


class Task(Protocol):
    """What this file needs of a task; where data is labelled it also has `label`, the column."""

    columns: list[str]
    """Raw columns wanted: the text, the second text if there is one, the label if there is one."""

    def settings(self) -> dict[str, Any]: ...

    def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]: ...


def split(dataset: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, validation): of the distinct rows, the share with the smallest hashes is held out."""
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction is {fraction}; it must lie between 0 and 1.")
    hashes = np.array([*_row_hashes(dataset)], dtype=np.uint64)
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise UserError(
            f"no rows can be held out for validation: the training data has {len(distinct)} "
            "distinct row(s); give at least 2, or name other data as data.validation."
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = hashes <= distinct[count - 1]
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def first_rows(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    """`count` rows, those with the smallest hashes: what they are depends on the data alone, and
    those of a smaller count are among those of a larger."""
    if count > len(dataset):
        raise UserError(
            f"data.train_rows: {count} is more than the {len(dataset)} rows of the training data; "
            f"give {len(dataset)} or less, or leave it out for all."
        )
    hashes = np.array([*_row_hashes(dataset)], dtype=np.uint64)
    return dataset.select(np.sort(np.argsort(hashes, kind="stable")[:count]))


def prepare(
    train: str,
    validation: str | None,
    validation_fraction: float,
    task: Task,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None,
    train_rows: int | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Tokenised (train, validation), from the cache where it was tokenised before."""
    if validation is not None and locate(validation) == locate(train):
        raise UserError(
            f"data.validation is the training data ({validation!r}); leave data.validation empty "
            "to hold out data.validation_fraction of the training rows, or name other data."
        )

    @cache
    def raw(source: str) -> datasets.Dataset:
        label, structured = getattr(task, "label", None), getattr(task, "structured_label", False)
        return read(source, task.columns, label, structured, getattr(task, "keys", None))

    # Raw rows are split, so that every tokenizer and max_length holds out the same ones.
    @cache
    def parts() -> tuple[datasets.Dataset, datasets.Dataset]:
        return split(raw(train), validation_fraction)

    def tokenised(source: str, part: str, rows: Callable[[], datasets.Dataset]) -> datasets.Dataset:
        key = _key([fingerprint(source), part], task, tokenizer, max_length)
        return _through_cache(cache_folder(cache_dir) / key, rows, task, tokenizer, max_length)

    def training(part: str, rows: Callable[[], datasets.Dataset]) -> datasets.Dataset:
        if train_rows is None:
            return tokenised(train, part, rows)
        return tokenised(
            train, f"{train_rows} rows, {part}", lambda: first_rows(rows(), train_rows)
        )

    if validation is not None:
        return (
            training("all", lambda: raw(train)),
            tokenised(validation, "all", lambda: raw(validation)),
        )
    return (
        training(f"without {validation_fraction}", lambda: parts()[0]),
        tokenised(train, f"held out {validation_fraction}", lambda: parts()[1]),
    )


class Sampler:
    """Which rows one rank sees in each optimizer step: a pure function of seed, step and layout.

    The global batch of a step is the same run of the epoch's permutation however it is laid out
    over ranks and gradient accumulation. A slot that an epoch's last batch cannot fill holds -1.
    """

    def __init__(
        self,
        rows: int,
        micro_batch: int,
        grad_accum: int,
        rank: int,
        world: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        assert min(rows, micro_batch, grad_accum) > 0 and 0 <= rank < world
        self.rows, self.rank, self.seed, self.shuffle = rows, rank, seed, shuffle
        self.grad_accum = grad_accum
        self.layout = (grad_accum, world, micro_batch)
        self.global_batch = micro_batch * grad_accum * world
        self.steps_per_epoch = -(-rows // self.global_batch)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of this rank at a global step."""
        start = step % self.steps_per_epoch * self.global_batch
        found = self._permutation(self.epoch(step))[start : start + self.global_batch]
        slots = np.full(self.global_batch, -1, dtype=np.int64)
        slots[: len(found)] = found
        return slots.reshape(self.layout)[:, self.rank].tolist()

    def mark(self, step: int) -> int:
        """Of 32 bits; tells the global batch of a step from another, alike on every rank."""
        start = step % self.steps_per_epoch * self.global_batch
        rows = self._permutation(self.epoch(step))[start : start + self.global_batch]
        return zlib.crc32(np.array([self.rows, *self.layout, *rows], dtype=np.int64).tobytes())

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch])
            self._order = order.permutation(self.rows) if self.shuffle else np.arange(self.rows)
            self._epoch = epoch
        return self._order


def batches(
    dataset: datasets.Dataset,
    sampler: Sampler,
    start_step: int,
    stop_step: int,
    collate: Callable[[list[dict[str, Any]], list[bool]], Any],
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Any]]:
    """For each step, its collated micro-batches.

    A row carries "row" (its number) and "epoch". Where `keep` is False the slot is empty; row 0 is
    there to fill it.
    """
    loader = torch.utils.data.DataLoader(
        _Rows(dataset),
        batch_sampler=_Slots(sampler, start_step, stop_step),
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals if workers else None,
        # A worker that is stuck is an error, not a wait without end.
        timeout=LOADER_TIMEOUT if workers else 0,
        # Else it draws from the global generator, and a resumed run sees other dropout.
        generator=torch.Generator(),
    )
    micro_batches = iter(loader)
    for _ in range(start_step, stop_step):
        yield [next(micro_batches) for _ in range(sampler.grad_accum)]


def _ignore_signals(worker: int) -> None:
    """What is sent to every process of a run is for those that train."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class _Slots:
    sampler: Sampler
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch = self.sampler.epoch(step)
            for rows in self.sampler.step(step):
                yield [(row, epoch) for row in rows]


@dataclass
class _Rows:
    dataset: datasets.Dataset

    def __getitems__(self, slots: list[tuple[int, int]]) -> list[tuple[dict[str, Any], bool]]:
        rows = self.dataset.__getitems__([max(row, 0) for row, _ in slots])
        return [
            ({**found, "row": max(row, 0), "epoch": epoch}, row >= 0)
            for found, (row, epoch) in zip(rows, slots, strict=True)
        ]


@dataclass
class _Collate:
    collate: Callable[[list[dict[str, Any]], list[bool]], Any]

    def __call__(self, slots: list[tuple[dict[str, Any], bool]]) -> Any:
        return self.collate([row for row, _ in slots], [keep for _, keep in slots])


def _row_hashes(dataset: datasets.Dataset) -> Iterator[int]:
    for batch in dataset.iter(1000):
        for row in zip(*batch.values(), strict=True):
            text = json.dumps(row, default=str)
            yield int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


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
    return [type(tokenizer).__name__, model, tokenizer.special_tokens_map, sides]


def cache_folder(cache_dir: str | None) -> Path:
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("MLKD_CACHE") or f"{home}/mlkd_dist"
    return Path(cache_dir).expanduser()


def _through_cache(
    entry: Path, rows: Callable[[], datasets.Dataset], task: Task, tokenizer: Any, max_length: int
) -> datasets.Dataset:
    if (found := _load(entry)) is not None:
        return found
    raw = rows()
    work = entry.parent / f".{entry.name[:16]}-{uuid.uuid4().hex}"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"tokenised data cannot be written to {str(entry.parent)!r} ({error.strerror}); "
            "set data.cache or $MLKD_CACHE to a folder that can be written."
        ) from error
    try:
        encoded = raw.map(
            lambda batch: task.encode(batch, tokenizer, max_length),
            batched=True,
            remove_columns=raw.column_names,
            cache_file_name=str(work / "encoded.arrow"),
            # Else datasets pickles task and tokenizer to name a cache file that nobody reads.
            new_fingerprint=entry.name[:32],
        )
        if not len(encoded):
            raise UserError(
                f"no text of the data has anything to learn (columns: {', '.join(task.columns)}); "
                f"give longer texts, or more of them."
            )
        encoded.save_to_disk(work / "entry")
        _install(work / "entry", entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return datasets.load_from_disk(entry)


def _install(made: Path, entry: Path) -> None:
    """Renamed in one go: who looks sees no entry or a whole one, whichever writer was first."""
    try:
        made.rename(entry)
    except OSError:
        if _load(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
            made.rename(entry)


def _load(entry: Path) -> datasets.Dataset | None:
    try:
        return datasets.load_from_disk(entry)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
