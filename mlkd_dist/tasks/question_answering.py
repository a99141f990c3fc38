"""The answer to a question as a span of a passage, as in SQuAD: where it starts and where it ends.

A passage that is too long is read in windows that overlap; a window without the answer, and a
question without one, point at the first token.
"""

import hashlib
import re
import string
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from mlkd_dist.tasks import IGNORE, BadRow, Batch, Decides, pad
from mlkd_dist.trace import Trace

# Characters of a passage: each of its windows is kept with all of it.
LONGEST_PASSAGE = 200_000
# Tokens of the longest answer that is looked for.
LONGEST = 30
# Of a token that is no part of the passage, in place of its characters.
OUTSIDE = [-1, -1]
# What is kept of a window.
WINDOW = {
    "example": torch.int64,
    "score": torch.float64,
    "nothing": torch.float64,
    "start": torch.int64,
    "end": torch.int64,
    "em": torch.float64,
    "f1": torch.float64,
    "answerable": torch.bool,
    "loss": torch.float64,
}


class Task:
    model_class = AutoModelForQuestionAnswering
    reads = frozenset({"logits"})
    vocabulary = False
    decides = Decides("f1")
    label_keys = ("text", "answer_start")

    def __init__(self, settings: Any, data: Any):
        self.question, self.passage, self.label = data.text, data.text_pair, data.label
        self.columns = [self.question, self.passage, self.label]
        self.stride = settings.stride
        self.longest = {self.passage: LONGEST_PASSAGE}

    def settings(self) -> dict[str, Any]:
        return {"kind": "question_answering", "columns": self.columns, "stride": self.stride}

    def check(self, row: dict[str, Any]) -> None:
        self.answers(row[self.label], row[self.passage])

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token comes from; "
                f"question_answering needs a model with a fast tokenizer."
            )
        passages = rows[self.passage]
        answers = [self.answers(*row) for row in zip(rows[self.label], passages, strict=True)]
        stride = max_length // 3 if self.stride is None else self.stride
        # Some questions begin with spaces, which would take the place of the passage.
        questions = [question.strip() for question in rows[self.question]]
        self.check_room(questions, tokenizer, max_length, stride)
        encoded = tokenizer(
            questions,
            passages,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = encoded["overflow_to_sample_mapping"]
        spans = [
            [
                list(place) if part == 1 else OUTSIDE
                for place, part in zip(places, encoded.sequence_ids(window), strict=True)
            ]
            for window, places in enumerate(encoded["offset_mapping"])
        ]
        kept = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        return kept | {
            "labels": [token_span(s, answers[i]) for s, i in zip(spans, sources, strict=True)],
            "spans": spans,
            "passage": [passages[i] for i in sources],
            "answers": [[text for text, _ in answers[i]] for i in sources],
            "example": [digest(questions[i], passages[i], answers[i]) for i in sources],
        }

    def answers(self, given: Any, passage: str) -> list[tuple[str, int]]:
        """(text, first character) of each; none where the passage does not hold the answer."""
        lists = given["text"], given["answer_start"]
        if all(isinstance(each, list) for each in lists) and len(lists[0]) == len(lists[1]):
            found = list(zip(*lists, strict=True))
            if all(is_piece(text, start, passage) for text, start in found):
                return found
        raise BadRow(
            f"column {self.label!r}: {str(given)[:80]!r} is not an answer",
            'give {"text": [...], "answer_start": [...]}, pieces of the passage with the number of '
            "their first character, or empty lists where there is none",
        )

    def check_room(
        self, questions: list[str], tokenizer: Any, max_length: int, stride: int
    ) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
        room = max_length - special - max(lengths)
        if room <= stride:
            longest = questions[lengths.index(max(lengths))]
            raise BadRow(
                f"the question {longest[:60]!r} has {max(lengths)} tokens and leaves {room} of "
                f"data.max_length {max_length} to the passage, whose windows overlap by {stride}",
                "set data.max_length higher, or task.stride lower",
            )

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        kept, inputs = torch.tensor(keep), pad(rows, tokenizer)
        labels = torch.tensor([row["labels"] for row in rows])
        # Some tokenizers pad on the left.
        labels = labels + inputs["attention_mask"].argmax(1, keepdim=True)
        labels = labels.masked_fill(~kept.unsqueeze(1), IGNORE)
        return Batch(inputs, kept, labels, kept.unsqueeze(1).expand(-1, 2), rows)

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        """Of every window: its best span, how well that answers, the score of no answer, and how
        unlikely the truth is."""
        logits = trace.logits.float().cpu()
        mask = batch.inputs["attention_mask"].bool().cpu()
        found = [
            window(logits[i][:, mask[i]], batch.rows[i])
            for i in batch.keep.nonzero()[:, 0].tolist()
        ]
        columns = zip(*found, strict=True) if found else [[]] * len(WINDOW)
        return {
            name: torch.tensor(column, dtype=dtype)
            for (name, dtype), column in zip(WINDOW.items(), columns, strict=True)
        }

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Exact match and F1 of words, in percent, as SQuAD counts them: against the nearest of the
        given answers, and where questions without an answer are among them, silence counts."""
        chosen = answers_of(outputs)
        return {
            name: 100 * sum(answer[name] for answer in chosen.values()) / len(chosen)
            for name in ("em", "f1")
        }

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """-log of the probability of the first and last token, mean of both, over windows."""
        return {"loss": float(outputs["loss"].mean())}

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        ours, theirs = answers_of(student), answers_of(teacher)
        same = [ours[key]["span"] == theirs[key]["span"] for key in theirs]
        return {"same_answer": sum(same) / len(same)}


def is_piece(text: Any, start: Any, passage: str) -> bool:
    whole = isinstance(text, str) and text != "" and type(start) is int and start >= 0
    return whole and passage.startswith(text, start)


def token_span(spans: list[list[int]], answers: list[tuple[str, int]]) -> list[int]:
    """First and last token of the first answer, but for white space at its ends; 0 and 0 where this
    window does not hold it all."""
    if not answers:
        return [0, 0]
    text, start = answers[0]
    end = start + len(text.rstrip())
    start += len(text) - len(text.lstrip())
    inside = [i for i, (a, b) in enumerate(spans) if a >= 0 and a < end and b > start]
    whole = inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= end
    return [inside[0], inside[-1]] if whole else [0, 0]


def digest(*parts: Any) -> int:
    """Names an example, so that its windows find each other."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def window(logits: Tensor, row: dict[str, Any]) -> tuple[Any, ...]:  # [2, n] of the real tokens
    spans = torch.tensor(row["spans"])
    inside = spans[:, 0] >= 0
    allowed = (inside[:, None] & inside).triu().tril(LONGEST - 1)
    scores = (logits[0][:, None] + logits[1]).masked_fill(~allowed, float("-inf"))
    first, last = divmod(int(scores.argmax()), len(spans))
    start, end = int(spans[first, 0]), int(spans[last, 1])
    said = row["passage"][max(start, 0) : max(end, 0)]
    em, f1 = (max((m(said, a) for a in row["answers"]), default=0.0) for m in (exact, words_f1))
    nothing = float(logits[0, 0] + logits[1, 0])
    answerable = bool(row["answers"])
    likely = logits.double().log_softmax(-1)
    loss = -float(likely[0, row["labels"][0]] + likely[1, row["labels"][1]]) / 2
    return row["example"], float(scores.max()), nothing, start, end, em, f1, answerable, loss


def answers_of(outputs: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Example -> its answer: the best span of all windows, or none where every window rather says
    so and some example has none."""
    columns = (column.tolist() for column in outputs.values())
    windows = [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)]
    silence = not all(found["answerable"] for found in windows)
    chosen: dict[int, dict[str, Any]] = {}
    for found in windows:
        before = chosen.get(found["example"])
        nothing = min(found["nothing"], before["nothing"] if before else found["nothing"])
        best = max(found, before or found, key=lambda x: x["score"])
        chosen[found["example"]] = best | {"nothing": nothing}
    for answer in chosen.values():
        answer["span"] = (answer["start"], answer["end"])
        if silence and answer["nothing"] > answer["score"]:
            right = float(not answer["answerable"])
            answer |= {"span": None, "em": right, "f1": right}
    return chosen


def words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact(said: str, truth: str) -> float:
    return float(words(said) == words(truth))


def words_f1(said: str, truth: str) -> float:
    ours, theirs = words(said), words(truth)
    common = (Counter(ours) & Counter(theirs)).total()
    if not common:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))
