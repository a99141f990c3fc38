"""Causal language modelling: the model says each next token, of documents or of completions."""

import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mlkd_dist.tasks import BROKEN, IGNORE, BadRow, Batch, Decides
from mlkd_dist.tasks._rouge import rouge_l
from mlkd_dist.tasks._vocabulary import (
    accuracy,
    mean_loss,
    perplexity,
    same_token,
    token_outputs,
)
from mlkd_dist.trace import Trace

# Characters of a document: above it a file has lost its line ends.
LONGEST_DOCUMENT = 50_000_000
# What chat templates call who speaks. Others must stand in the template itself, since most write
# whatever they are given.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# A part of a sequence, and whether the model learns to say its tokens.
Part = tuple[list[int], bool]


class Task:
    """Rows are documents (`data.text`), prompts with completions (`data.prompt`, `data.completion`)
    or chats (`data.messages`). Completions and the turns of the assistant are learned, what leads
    to them is read only."""

    model_class = AutoModelForCausalLM
    reads = frozenset({"head"})
    vocabulary = True
    decides = Decides("perplexity", higher=False)

    def __init__(self, settings: Any, data: Any):
        self.pack = data.pack
        if data.messages is not None:
            self.keys = {data.messages: "data.messages"}
        elif data.prompt is not None:
            self.keys = {data.prompt: "data.prompt", data.completion: "data.completion"}
        else:
            self.keys = {data.text: "data.text"}
        self.columns = list(self.keys)
        self.longest = dict.fromkeys(self.columns, LONGEST_DOCUMENT)
        self.prompted = "data.text" not in self.keys.values()

    def settings(self) -> dict[str, Any]:
        return {"kind": "causal_lm", "columns": self.keys, "pack": self.pack}

    def check(self, row: dict[str, Any]) -> None:
        if list(self.keys.values()) == ["data.messages"]:
            check_messages(row[self.columns[0]])

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        if list(self.keys.values()) == ["data.messages"]:
            check_template(tokenizer)
        sequences = []
        for row in zip(*(rows[name] for name in self.columns), strict=True):
            ids, target = joined(self.parts(row, tokenizer, max_length))
            if not any(target[1:max_length]):
                raise BadRow(
                    f"column {self.columns[0]!r}: {row[0][:40]!r} has {len(ids)} token(s), which "
                    f"leaves nothing to learn",
                    "give a longer text or remove the row",
                )
            # A document goes on in the next sequence; a completion ends with its sequence.
            ends = len(ids) if list(self.keys.values()) == ["data.text"] else 1
            for start in range(0, ends, max_length):
                piece = slice(start, start + max_length)
                # The first token follows nothing that could tell it.
                sequences.append((ids[piece], [False, *target[piece][1:]]))
        sequences = [(ids, target) for ids, target in sequences if any(target)]
        if not self.pack:
            return {
                "input_ids": [ids for ids, _ in sequences],
                "target": [target for _, target in sequences],
            }
        rows_of = packed([len(ids) for ids, _ in sequences], max_length)
        return {
            "input_ids": [sum((sequences[i][0] for i in row), []) for row in rows_of],
            "target": [sum((sequences[i][1] for i in row), []) for row in rows_of],
            "lengths": [[len(sequences[i][0]) for i in row] for row in rows_of],
        }

    def parts(
        self, row: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Part]:
        def tokens(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        match list(self.keys.values()):
            case ["data.text"]:
                return [(beginning(tokenizer) + tokens(row[0]) + end, True)]
            case ["data.messages"]:
                turns = chat(json.loads(row[0]), tokenizer)
                parts = [(tokens(text), learned) for text, learned in turns]
            case _:
                said = tokens(row[1])
                if not said:
                    raise BadRow(
                        f"column {self.columns[1]!r}: the completion of the prompt "
                        f"{row[0][:40]!r} is empty",
                        "fill it or remove the row",
                    )
                parts = [(beginning(tokenizer) + tokens(row[0]), False), (said + end, True)]
        before = len(parts[0][0])
        if before >= max_length:
            raise BadRow(
                f"column {self.columns[0]!r}: what leads to the first completion has {before} "
                f"tokens ({row[0][:40]!r}...) and data.max_length is {max_length}, which leaves "
                f"none for the completion",
                "raise data.max_length or remove the row",
            )
        return parts

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        """The label of a place is the token after it, so that labels and logits stand side by
        side."""
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        fill = tokenizer.pad_token_id
        ids = torch.full(shape, tokenizer.eos_token_id or 0 if fill is None else fill)
        mask, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels, documents = torch.full(shape, IGNORE), torch.full(shape, -1)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            start = shape[1] - length if tokenizer.padding_side == "left" else 0
            place = slice(start, start + length)
            lengths = row.get("lengths", [length])
            ids[i, place], mask[i, place] = torch.tensor(row["input_ids"]), 1
            positions[i, place] = torch.cat([torch.arange(n) for n in lengths])
            documents[i, place] = torch.repeat_interleave(torch.tensor(lengths))
            if keep[i]:
                truth = torch.where(torch.tensor(row["target"]), ids[i, place], IGNORE)
                labels[i, start : start + length - 1] = truth[1:]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if self.pack:
            inputs["documents"] = documents
        return Batch(inputs, torch.tensor(keep), labels=labels, label_keep=labels != IGNORE)

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        return token_outputs(trace, batch)

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return {"next_token_accuracy": accuracy(outputs), "perplexity": perplexity(outputs)}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        return {"loss": mean_loss(outputs)}

    def examples(self, row: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
        """What leads to the last thing to be said, and that; of each document of a packed row."""
        start = 0
        for length in row.get("lengths", [len(row["input_ids"])]):
            ids, target = (row[key][start : start + length] for key in ("input_ids", "target"))
            end = length - target[::-1].index(True)
            begin = end - [*target[:end][::-1], False].index(False)
            yield ids[:begin], ids[begin:end]
            start += length

    def answered(self, prompt: list[int], said: list[int]) -> dict[str, Any]:
        target = [False] * len(prompt) + [True] * len(said)
        return {"input_ids": prompt + said, "target": target}

    def answer_quality(self, said: list[str], meant: list[str]) -> dict[str, float]:
        return rouge_l(said, meant)

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        return same_token(student, teacher)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that this tokenizer puts before a text. Those that it puts after one are
    left out: there the end-of-text token stands."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    starts = (k for k in range(len(marked)) if marked[k : k + len(plain)] == plain)
    return marked[: next(starts, 0)]


def joined(parts: list[Part]) -> Part:
    ids = [token for tokens, _ in parts for token in tokens]
    return ids, [learned for tokens, learned in parts for _ in tokens]


def chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a chat in parts, as the tokenizer's template writes it: what leads to each turn
    of the assistant, with the template's opening of it, and the turn."""
    check_roles(messages, tokenizer)

    def text(upto: int, opening: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=opening
            )
        except TemplateError as error:
            said = " ".join(str(error).split())
            raise BadRow(
                f"data.messages: the tokenizer's chat template refuses the chat ({said})",
                "write it as the template has it",
            ) from error

    parts, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, learned in ((i, False), (i + 1, True)):
            found = text(upto, opening=not learned)
            if not found.startswith(done):
                raise BadRow(
                    f"data.messages: the tokenizer's chat template writes turn {i + 1} so that "
                    f"what went before is no longer its beginning",
                    "give one answer per row, as data.prompt and data.completion",
                )
            parts.append((found[len(done) :], learned))
            done = found
    return parts


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"data.messages: {type(tokenizer).__name__} has no chat template; use a model made for "
            f"chats, or give data.prompt and data.completion."
        )


def check_roles(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    for message in messages:
        role = message["role"]
        if role not in ROLES and (not role or role not in str(tokenizer.chat_template)):
            raise BadRow(
                f"data.messages: {role!r} is no role that the tokenizer's chat template knows",
                f"use {', '.join(ROLES)}",
            )


def check_messages(text: str) -> None:
    """That a chat, as JSON, is one with something to learn."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        messages = None
    shown = " ".join(text[:80].split())
    wrong = not isinstance(messages, list) or not all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content"))
        for m in messages
    )
    if wrong or not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise BadRow(
            f"data.messages: {shown} is not a chat",
            'give a list of {"role": ..., "content": ...} with at least one answer of the role '
            '"assistant"',
        )
    if messages[0]["role"] == "assistant":
        raise BadRow(
            f"data.messages: {shown} begins with an answer",
            "give what it answers, or remove the row",
        )


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not BROKEN.search(value)


def packed(lengths: list[int], size: int) -> list[list[int]]:
    """Which sequences share a row of `size` tokens: the longest first, each where it leaves the
    least room."""
    rows, room = [], []  # room: (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], -1))
        left, row = room.pop(at) if at < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (left - lengths[i], row))
    return rows
