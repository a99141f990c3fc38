"""Which raw rows are used: those held out, the first ones, the good ones."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np

from mlkd_dist.config import UserError
from mlkd_dist.inputs.columns import LINE
from mlkd_dist.inputs.quarantine import Sieve
from mlkd_dist.tasks import BadRow

# Rows that are tried in one go.
TOGETHER = 100


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
    refuse_too_many(count, len(dataset))
    return dataset.select(np.sort(_by_hash(dataset)[:count]))


def good_rows(
    dataset: datasets.Dataset,
    count: int | None,
    encode: Callable[[dict[str, list]], Any],
    sieve: Sieve,
) -> datasets.Dataset:
    """The rows that `encode` takes: all, or the `count` of them with the smallest hashes. Those
    that it refuses on the way go into `sieve`."""
    order = np.arange(len(dataset)) if count is None else _by_hash(dataset)
    good = np.empty(0, dtype=order.dtype)
    while len(order) and (count is None or len(good) < count):
        left = len(order) if count is None else count - len(good)
        look, order = np.sort(order[:left]), order[left:]
        part = dataset.select(look)
        bad = dict(_refused(part, encode))
        for i, error in bad.items():
            row = dict(part[i])
            sieve.refuse(row.pop(LINE), error, json.dumps(row, default=str))
        good = np.append(good, np.delete(look, list(bad)))
    if count is not None:
        refuse_too_many(count, len(good), "good ")
    return dataset.select(np.sort(good))


def refuse_too_many(count: int, there: int, kind: str = "") -> None:
    if count > there:
        raise UserError(
            f"data.train_rows: {count} is more than the {there} {kind}rows of the training data; "
            f"give {there} or less, or leave it out for all."
        )


def _refused(
    dataset: datasets.Dataset, encode: Callable[[dict[str, list]], Any]
) -> Iterator[tuple[int, BadRow]]:
    """The rows of a batch that fails are tried one by one."""
    for start in range(0, len(dataset), TOGETHER):
        batch = dataset[start : start + TOGETHER]
        try:
            encode(batch)
        except BadRow:
            for i in range(len(batch[LINE])):
                try:
                    encode({name: values[i : i + 1] for name, values in batch.items()})
                except BadRow as error:
                    yield start + i, error


def _by_hash(dataset: datasets.Dataset) -> np.ndarray:
    hashes = np.array([*_row_hashes(dataset)], dtype=np.uint64)
    return np.argsort(hashes, kind="stable")


def _row_hashes(dataset: datasets.Dataset) -> Iterator[int]:
    # Where a row stands is not what it is.
    names = [name for name in dataset.column_names if name != LINE]
    for batch in dataset.select_columns(names).iter(1000):
        for row in zip(*batch.values(), strict=True):
            text = json.dumps(row, default=str)
            yield int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
