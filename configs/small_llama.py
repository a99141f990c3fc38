"""Writes an untrained Llama of 4 layers and its tokenizer, for small_llama.yaml: a pair of decoders
that is trained from nothing on text that every Python carries. For small_llama_on_policy.yaml, also
how each text begins and how it goes on.

    python configs/small_llama.py [FOLDER]        default: models/small-llama
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlkd_dist.builtin_text import passages

END = "<|end|>"


def tokenizer() -> PreTrainedTokenizerFast:
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
    found.train_from_iterator(passages(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, model_max_length=256)


def write_pairs(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first 16 words of each text that are no more than 64 tokens, and the 32 after them."""
    with path.open("w") as file:
        for passage in passages():
            words = passage.split()
            begins, goes_on = " ".join(words[:16]), " ".join(words[16:48])
            if goes_on and len(tokenizer(begins)["input_ids"]) <= 64:
                file.write(json.dumps({"prompt": begins, "completion": f" {goes_on}"}) + "\n")


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


def main(folder: str) -> None:
    untrained().save_pretrained(folder)
    made = tokenizer()
    made.save_pretrained(folder)
    write_pairs(Path(folder) / "pairs.jsonl", made)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "models/small-llama")
