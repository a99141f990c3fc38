"""What a teacher said of the training rows, in files: found by what is in a row, in any order,
batch and number of processes. See cache.py for how they are written.

    runs/cache/
      manifest.json                  what it is, and size and hash of every other file
      begun.json                     what its files are made for, also before they are all there
      index.safetensors              keys of all rows, sorted, and where each of them lies
      shard-00000-HASH.safetensors   keys, starts, and of each row that counts
                                     gaps, ids, rest (the largest logits) or logits (all of them);
                                     token_starts and each state that was asked for, such as
                                     "layer 11 hidden" of every real token or "mean" of the sample

Files are mapped, not loaded: only what is read of them comes into memory.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from mlkd_dist.config import UserError
from mlkd_dist.models.head import TopKRows
from mlkd_dist.saving import commit
from mlkd_dist.tasks import Batch, Said
from mlkd_dist.trace import LOGIT_READS, VECTOR_READS, Needs, Trace

INDEX, BEGUN = "index.safetensors", "begun.json"
# The columns of logits that there may be.
LOGITS = ("gaps", "ids", "rest", "logits")
# Entries up to which two bytes name one.
SHORT_IDS = 2**16
AGAIN = "run `mlkd cache` with this config"
# What is kept beside logits: of a layer, or of the whole model. Vectors are one per sample.
STATE = re.compile(r"(?:layer (\d+) )?(\w+)")


def state_names(needs: Needs) -> list[str]:
    """What of a forward pass is kept beside its logits."""
    found = [f"layer {i} {name}" for i, names in needs.layers.items() for name in names]
    return sorted([*found, *(needs.model - LOGIT_READS)])


def state_needs(states: list[str]) -> Needs:
    """The other way round."""
    needs = Needs()
    for state in states:
        layer, name = STATE.fullmatch(state).groups()
        own = frozenset({name})
        needs = needs.union(Needs(own) if layer is None else Needs(layers={int(layer): own}))
    return needs


def read_state(trace: Trace, state: str) -> Tensor:  # [B, D] or [B, L, D]
    layer, name = STATE.fullmatch(state).groups()
    if layer is not None:
        return getattr(trace.layers[int(layer)], name)
    return trace.vectors[name] if is_vector(state) else getattr(trace, name)


def show_state(trace: Trace, state: str, tensor: Tensor) -> None:
    layer, name = STATE.fullmatch(state).groups()
    if layer is not None:
        setattr(trace.layer(int(layer)), name, tensor)
    elif is_vector(state):
        trace.vectors[name] = tensor
    else:
        setattr(trace, name, tensor)


def is_vector(state: str) -> bool:
    return STATE.fullmatch(state)[2] in VECTOR_READS


def row_keys(batch: Batch) -> list[bytes | None]:
    """Of every sample of a batch on the CPU, what the teacher reads of it and which of its rows
    count, in 16 bytes; None for one that only fills the batch."""
    mask, tokens = batch.inputs["attention_mask"].bool(), batch.label_keep.shape
    read = [(n, x) for n, x in sorted(batch.inputs.items()) if n != "attention_mask"]
    if tokens == mask.shape:
        read.append(("counts", batch.label_keep))
    keys: list[bytes | None] = []
    for keep, real, *columns in zip(batch.keep.tolist(), mask, *(x for _, x in read), strict=True):
        digest = xxhash.xxh3_128()
        for (name, _), column in zip(read, columns, strict=True):
            digest.update(name.encode())
            digest.update(column[real].to(torch.int64).numpy().tobytes())
        keys.append(digest.digest() if keep else None)
    return keys


def key_numbers(key: bytes) -> np.ndarray:  # [2] int64
    return np.frombuffer(key, dtype=np.int64)


class Stored:
    """A cache that was checked, and the states that are wanted of it."""

    def __init__(self, folder: Path, states: list[str]):
        found = commit.read_manifest(folder)["plan"]
        self.folder, self.temperatures = folder, tuple(found["temperatures"])
        self.vocabulary, self.states = found["vocabulary"], states
        self.shards = shard_names(folder)
        index = load_file(folder / INDEX)
        self.keys, self.places = index["keys"].numpy(), index["places"].numpy()
        # A file stays mapped once it was read.
        self.shard = lru_cache(None)(lambda number: load_file(folder / self.shards[number]))

    def place(self, key: bytes) -> tuple[int, int] | None:
        """(shard, row in it)"""
        high, low = key_numbers(key)
        at = np.searchsorted(self.keys[:, 0], high)
        while at < len(self.keys) and self.keys[at, 0] == high:
            if self.keys[at, 1] == low:
                return tuple(self.places[at].tolist())
            at += 1
        return None

    def entry(self, key: bytes) -> dict[str, Tensor]:
        place = self.place(key)
        if place is None:
            raise UserError(
                f"teacher.cache.dir: {str(self.folder)!r} has no such row as one of data.train; "
                f"{AGAIN}."
            )
        shard, row = self.shard(place[0]), place[1]
        return self.cut(shard, row)

    def cut(self, shard: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """What a shard has of one of its rows."""
        start, stop = shard["starts"][row : row + 2].tolist()
        found = {name: shard[name][start:stop] for name in LOGITS if name in shard}
        for name in self.states:
            start, stop = row, row + 1
            if not is_vector(name):
                start, stop = shard["token_starts"][row : row + 2].tolist()
            found[name] = shard[name][start:stop]
        return found

    def attach(self, batch: Batch) -> Batch:
        """With what the teacher said of it. On the CPU, also in a loader's process."""
        entries = [None if key is None else self.entry(key) for key in row_keys(batch)]
        batch.stored = Said(
            None if self.vocabulary else self.whole(batch, entries),
            self.largest(entries) if self.vocabulary else None,
            {state: self.state(state, batch, entries) for state in self.states},
        )
        return batch

    def state(
        self, name: str, batch: Batch, entries: list[dict[str, Tensor] | None]
    ) -> Tensor:  # [B, D] or [B, L, D]
        """0 at padding, and for a sample that only fills the batch."""
        mask, width = batch.inputs["attention_mask"].bool(), self.shard(0)[name].shape[1]
        shape = (len(mask), width) if is_vector(name) else (*mask.shape, width)
        states = self.shard(0)[name].new_zeros(shape)
        for row, (real, entry) in enumerate(zip(mask, entries, strict=True)):
            if entry is not None:
                states[row if is_vector(name) else (row, real)] = entry[name]
        return states

    def largest(self, entries: list[dict[str, Tensor] | None]) -> TopKRows:
        """In the order of Batch.label_rows."""
        # Of a batch that is filled up only, the type and width.
        found = [entry for entry in entries if entry is not None] or [self.nothing()]
        names = [name for name in LOGITS if name in found[0]]
        joined = {name: torch.cat([entry[name] for entry in found]) for name in names}
        ids = joined["ids"].int()
        if self.vocabulary <= SHORT_IDS:
            ids = ids & (SHORT_IDS - 1)
        rest = joined.get("rest")
        return TopKRows(joined["gaps"], ids, rest, self.temperatures, self.vocabulary)

    def whole(self, batch: Batch, entries: list[dict[str, Tensor] | None]) -> Tensor:
        """All logits of every sample, [B, C] or [B, 2, L]; 0 for one that only fills the batch."""
        if batch.label_keep.shape[1:] != (2,):
            found = [entry for entry in entries if entry is not None] or [self.nothing()]
            zero = torch.zeros(1, found[0]["logits"].shape[1])
            return torch.cat([zero if entry is None else entry["logits"] for entry in entries])
        mask = batch.inputs["attention_mask"].bool()
        logits = torch.full((len(mask), 2, mask.shape[1]), float("-inf"))
        for row, (real, entry) in enumerate(zip(mask, entries, strict=True)):
            logits[row][:, real] = 0.0 if entry is None else entry["logits"].mT
        return logits

    def nothing(self) -> dict[str, Tensor]:
        return {name: column[:0] for name, column in self.shard(0).items()}


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


class StoredTeacher:
    """In the place of a Teacher: what it says of a batch came with the batch."""

    def __init__(self, folder: str, states: list[str]):
        self.stored = Stored(Path(folder), states)

    def attach(self, batch: Batch) -> Batch:
        return self.stored.attach(batch)

    def __call__(self, batch: Batch) -> Trace:
        said = batch.stored
        trace = Trace(batch.inputs["attention_mask"].bool(), heads=0, labels=batch.labels)
        trace.logits, trace.top_k = said.logits, said.top_k
        for state, tensor in said.states.items():
            show_state(trace, state, tensor)
        return trace

    def close(self) -> None:
        pass
