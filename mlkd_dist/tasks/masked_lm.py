"""Masked language modelling: some tokens are hidden, the model says what they were."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from mlkd_dist.tasks import IGNORE, Batch, Decides, pad, tokens
from mlkd_dist.tasks._vocabulary import accuracy, mean_loss, perplexity, same_token, token_outputs
from mlkd_dist.trace import Trace


class Task:
    model_class = AutoModelForMaskedLM
    reads = frozenset({"head"})
    vocabulary = True
    redraws = True
    decides = Decides("perplexity", higher=False)

    def __init__(self, settings: Any, data: Any):
        self.columns = [data.text]
        self.probability = settings.mask_probability or 0.15

    def settings(self) -> dict[str, Any]:
        return {"kind": "masked_lm", "columns": self.columns}

    def check(self, row: dict[str, Any]) -> None:
        pass

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token; masked_lm needs a model trained "
                f"with one."
            )
        return tokens(
            [rows[self.columns[0]]],
            tokenizer,
            truncation=True,
            max_length=max_length,
            return_special_tokens_mask=True,
        )

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        hidden = [self.hide(row, tokenizer) for row in rows]
        inputs = pad(
            [row | {"input_ids": ids} for row, (ids, _) in zip(rows, hidden, strict=True)],
            tokenizer,
        )
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        # The pad token may also be a real one, so the place of a row is known by its attention mask
        # alone.
        for i, (_, truth) in enumerate(hidden):
            if keep[i]:
                labels[i, inputs["attention_mask"][i].bool()] = torch.from_numpy(truth)
        return Batch(inputs, torch.tensor(keep), labels=labels, label_keep=labels != IGNORE)

    def hide(
        self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], np.ndarray]:
        """Of the hidden tokens 80 % become the mask token, 10 % another one, 10 % stay (Devlin et
        al. 2018, arXiv 1810.04805). Drawn from the row and the epoch alone, so that batching cannot
        change it."""
        draw = np.random.default_rng([row["row"], row["epoch"]])
        ids = np.array(row["input_ids"])
        chosen = (draw.random(len(ids)) < self.probability) & ~np.array(
            row["special_tokens_mask"], bool
        )
        truth = np.where(chosen, ids, IGNORE)
        kind = draw.random(len(ids))
        ids = np.where(chosen & (kind < 0.8), tokenizer.mask_token_id, ids)
        ids = np.where(chosen & (kind >= 0.9), draw.integers(0, len(tokenizer), len(ids)), ids)
        return ids.tolist(), truth

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        return token_outputs(trace, batch)

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return {"masked_accuracy": accuracy(outputs), "perplexity": perplexity(outputs)}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return {"loss": mean_loss(outputs)}

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        return same_token(student, teacher)
