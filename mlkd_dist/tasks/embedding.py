"""Sentence vectors, without labels: the student's vectors should relate to one another as the
teacher's do."""

import math
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, PreTrainedTokenizerBase

from mlkd_dist.tasks import Batch, Decides, pad, tokens
from mlkd_dist.trace import Trace

# Of 2000 texts there are two million pairs, which take seconds; of 50000 they would not fit.
PAIRED = 2000


class Task:
    model_class = AutoModel
    vocabulary = False
    decides = Decides("spearman", by_teacher=True)

    def __init__(self, settings: Any, data: Any):
        self.columns = [data.text]
        self.pooling = settings.pooling or "mean"
        self.reads = frozenset({self.pooling})

    def settings(self) -> dict[str, Any]:
        return {"kind": "embedding", "columns": self.columns}

    def check(self, row: dict[str, Any]) -> None:
        pass

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        return tokens([rows[self.columns[0]]], tokenizer, truncation=True, max_length=max_length)

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        kept = torch.tensor(keep)
        return Batch(pad(rows, tokenizer), kept, labels=None, label_keep=kept)

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        return {"vector": normalize(trace.vectors[self.pooling].float(), dim=-1)[batch.keep].cpu()}

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Nothing is known of these texts but what the teacher says: see agreement."""
        return {}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return {}

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        """Spearman correlation of the cosine similarities of all pairs of held-out texts, of the
        first PAIRED where there are more; nothing where it is not defined."""
        vectors = [each["vector"][:PAIRED] for each in (student, teacher)]
        pairs = torch.triu_indices(len(vectors[0]), len(vectors[0]), offset=1)
        similarity = [(each @ each.T)[pairs[0], pairs[1]] for each in vectors]
        if min(len(each.unique()) for each in similarity) < 2:
            return {}
        found = float(spearmanr(*similarity).statistic)
        return {"spearman": found} if math.isfinite(found) else {}
