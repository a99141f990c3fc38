"""What a language model says after a prompt, by transformers' own `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_new_tokens: int,
    window: int,
    sharded: bool = False,
    draw: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt: the most likely ones, or those that `draw` leaves.

    They end with the first end token, which is among them, after `max_new_tokens`, or where prompt
    and answer fill the window. With `sharded` weights all processes call this with as many prompts
    and go on until the last of them is done, since each forward pass gathers the weights anew.
    """
    longest, ends = max(map(len, prompts)), end_tokens(model, tokenizer)
    rooms = [min(max_new_tokens, window - len(prompt)) for prompt in prompts]
    fill = tokenizer.pad_token_id
    fill = (ends or [0])[0] if fill is None else fill
    # To the left, so that what is said follows the prompt's last token in every row.
    ids = torch.full((len(prompts), longest), fill)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=max(rooms),
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=fill,
        use_cache=True,
    )
    with own_settings_off(model):
        said = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=draw,
            synced_gpus=sharded,
        )
    return [
        until_end(row[:room], ends)
        for row, room in zip(said[:, longest:].tolist(), rooms, strict=True)
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those that the model itself names: chats have several."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(e for e in (tokenizer.eos_token_id, *named) if e is not None))


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    found = (i + 1 for i, token in enumerate(tokens) if token in ends)
    return tokens[: next(found, len(tokens))]


@contextmanager
def own_settings_off(model: PreTrainedModel) -> Iterator[None]:
    """Else transformers takes what is not said from the model's folder: penalties, sampling, a
    minimum length."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class Pick(LogitsProcessor):
    """Leaves of each row the one token that a number u of [0, 1) picks: the first with which the
    probabilities, summed up in order, exceed u.

    So the token is drawn as by any sampling, and is a function of the model, the row and its own
    numbers. Random streams of the process are neither read nor moved.
    """

    def __init__(self, numbers: Tensor, start: int):  # [B, new tokens]; prompts of `start` tokens
        self.numbers, self.start = numbers, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, L], [B, V] -> [B, V]
        # In float64: summed up in fp32, rounding would now and then pick the next token.
        reached = scores.double().softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.start].to(reached)
        token = torch.searchsorted(reached, (number * reached[:, -1]).unsqueeze(1), right=True)
        token = token.clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def drawing(numbers: Tensor, start: int, temperature: float, top_p: float) -> LogitsProcessorList:
    """For `generate`: tokens drawn from softmax(logits / temperature), of the most likely ones that
    hold `top_p` of the probability between them."""
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    steps += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    return LogitsProcessorList([*steps, Pick(numbers, start)])
