"""Writes an untrained Llama of 4 layers and its tokenizer, for small_llama.yaml: a pair of decoders
that is trained from nothing on text that every Python carries. For small_llama_on_policy.yaml, also
how each text begins and how it goes on. From other text, for small_llama_instructions.yaml: prompts
with their completions, where both are no more than 128 tokens, and all of it as plain text.

    python configs/small_llama.py [FOLDER]        default: models/small-llama
    python configs/small_llama.py FOLDER PAIRS.jsonl [TEXT.txt ...]
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlkd_dist.inputs.builtin_text import passages

END, LONGEST = "<|endoftext|>", 128


def tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte pairs, as of GPT-2, learned from the text."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, model_max_length=256)


def halves(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """The first 16 words of each text that are no more than 64 tokens, and the 32 after them."""
    found = []
    for text in texts:
        words = text.split()
        begins, goes_on = " ".join(words[:16]), " ".join(words[16:48])
        if goes_on and len(tokenizer(begins)["input_ids"]) <= LONGEST // 2:
            found.append({"prompt": begins, "completion": f" {goes_on}"})
    return found


def read_pairs(path: str) -> list[dict[str, str]]:
    """Those with something in both. A completion's end is what the tokenizer adds to it."""
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        {"prompt": row["prompt"], "completion": row["completion"].removesuffix(END)} for row in rows
    ]
    return [row for row in pairs if row["prompt"].strip() and row["completion"].strip()]


def fitting(
    pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, str]]:
    lengths = tokenizer([row["prompt"] + row["completion"] for row in pairs])["input_ids"]
    return [row for row, ids in zip(pairs, lengths, strict=True) if len(ids) < LONGEST]


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def untrained() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def main(folder: str = "models/small-llama", pairs: str | None = None, *files: str) -> None:
    untrained().save_pretrained(folder)
    if pairs is None:
        texts = list(passages())
        made = tokenizer(texts)
        rows = halves(texts, made)
    else:
        rows = read_pairs(pairs)
        texts = [row["prompt"] + row["completion"] for row in rows]
        texts += [line for file in files for line in Path(file).read_text().splitlines()]
        made = tokenizer(texts)
        rows = fitting(rows, made)
        write(Path(folder) / "text.jsonl", ({"text": text} for text in texts if text.strip()))
    made.save_pretrained(folder)
    write(Path(folder) / "pairs.jsonl", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
