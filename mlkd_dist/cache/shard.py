"""One shard of a cache: what the teacher said of the rows of one piece."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlkd_dist.cache.stored import SHORT_IDS, is_vector, read_state, row_keys
from mlkd_dist.models.head import TopKRows, top_k_rows
from mlkd_dist.saving import commit
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Trace

# Rows of logits over a vocabulary that are looked at at once.
LOGIT_ROWS = 128


@dataclass
class Shard:
    plan: dict[str, Any]
    keys: list[bytes] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    outside: float = 0.0
    """Sum over the tokens of the teacher's probability of the entries that are not kept."""

    def add(self, batch: Batch, trace: Trace) -> None:
        """`batch` on the CPU, where it is what a key is made of."""
        self.keys += [key for key in row_keys(batch) if key is not None]
        self.keep_states(batch, trace)
        if self.plan["vocabulary"]:
            self.counts += batch.label_keep.sum(1)[batch.keep].tolist()
            self.put(**self.largest(batch, trace))
            return
        real = batch.inputs["attention_mask"].bool()
        for row, logits in enumerate(trace.logits.float().cpu()):
            if batch.keep[row]:
                # Of spans, [2, L] of the tokens without the padding.
                rows = logits[:, real[row]].mT if logits.ndim == 2 else logits.unsqueeze(0)
                self.counts.append(len(rows))
                self.put(logits=rows)

    def keep_states(self, batch: Batch, trace: Trace) -> None:
        """As the model has them, without the padding."""
        real = batch.inputs["attention_mask"].bool()
        rows = batch.keep.nonzero().flatten().tolist()
        self.tokens += real[rows].sum(1).tolist()
        for state in self.plan["states"]:
            found = read_state(trace, state).cpu()
            for row in rows:
                kept = found[row : row + 1] if is_vector(state) else found[row][real[row]]
                self.put(**{state: kept})

    def put(self, **columns: Tensor | None) -> None:
        for name, column in columns.items():
            if column is not None:
                self.columns.setdefault(name, []).append(column.cpu())

    def largest(self, batch: Batch, trace: Trace) -> dict[str, Tensor | None]:
        """Of every token that counts, in the order of Batch.label_rows."""
        states = trace.head_input.flatten(0, 1)
        entering = states.index_select(0, batch.label_rows.to(states.device))
        k, temperatures = self.plan["settings"]["teacher.cache.top_k"], self.plan["temperatures"]
        found = []
        with trace.head.opened(entering) as rows:
            rows = rows.first(self.plan["vocabulary"])
            for hidden in rows.hidden.split(LOGIT_ROWS):
                found.append(top_k_rows(rows.of(hidden).logits(), k, tuple(temperatures)))
        self.outside += sum(float(outside(part)) for part in found)
        ids = torch.cat([part.ids for part in found])
        short = self.plan["vocabulary"] <= SHORT_IDS
        return {
            "gaps": torch.cat([part.gaps for part in found]),
            "ids": ids.to(torch.int16) if short else ids,
            "rest": None if found[0].rest is None else torch.cat([part.rest for part in found]),
        }

    def save(self, folder: Path, unit: int) -> None:
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.columns.items()}
        keys = np.frombuffer(b"".join(self.keys), dtype=np.int64).reshape(-1, 2)
        tensors["keys"] = torch.from_numpy(keys.copy())
        tensors["starts"] = torch.tensor([0, *np.cumsum(self.counts)], dtype=torch.int64)
        if self.plan["states"]:
            tensors["token_starts"] = torch.tensor([0, *np.cumsum(self.tokens)], dtype=torch.int64)
        partial = folder / f"shard-{unit:05d}{commit.PARTIAL}"
        save_file(tensors, partial, metadata={"outside": repr(self.outside)})
        ((_, seal),) = commit.seal_files(folder, [partial.name]).items()
        commit.reached("shard sealed")
        partial.rename(folder / f"shard-{unit:05d}-{seal['xxh3']}.safetensors")
        commit.sync(folder)
        commit.reached("shard there")


def outside(rows: TopKRows) -> Tensor:  # scalar
    """The sum over rows of the probability of what is not kept, at the first temperature."""
    if rows.rest is None:
        return torch.zeros(())
    scores, _, rest = rows.scores(rows.temperatures[0])
    return torch.cat([scores, rest.unsqueeze(1)], 1).softmax(1)[:, -1].double().sum()
