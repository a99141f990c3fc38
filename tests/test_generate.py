"""What models say after prompts: token by token as by hand, drawn as told, measured by ROUGE-L."""

import json
from typing import Any

import pytest
import torch
from conftest import made_tokenizer
from test_causal_lm import PAIRS, TEMPLATE, rows_of, task_of
from test_head import language_model
from transformers import PreTrainedTokenizerBase

from mlkd_dist.generation.generate import Pick, drawing, end_tokens, generate
from mlkd_dist.tasks._rouge import rouge_l

CPU = torch.device("cpu")
# Of lengths so different that padding would show; w0 has the number 5.
PROMPTS = [[2, 5, 6, 7, 8, 9], [2, 10], [2, 11, 12]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


def by_hand(model: Any, prompt: list[int], ends: list[int], tokens: int) -> list[int]:
    """One prompt alone, the whole text anew for each token, without padding or a cache."""
    said: list[int] = []
    while len(said) < tokens and not (said and said[-1] in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize(
    "family", ["GPT2", "OPT", "GPTNeoX", "Llama", "Mistral", "Qwen3", "Gemma2"]
)
def test_greedy_answers_are_those_of_each_prompt_alone(
    tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    # A window of attention that is shorter than what is said, where the family has one.
    changes = {"sliding_window": 4} if family in ("Mistral", "Gemma2") else {}
    model = language_model(family, 3, **changes).eval()
    # What a folder may ask for, none of which is wanted here.
    model.generation_config.repetition_penalty, model.generation_config.min_length = 5.0, 30
    model.generation_config.eos_token_id = None
    kept = model.generation_config
    first = generate(model, PROMPTS, tokenizer, CPU, 10, 14)
    assert model.generation_config is kept and len(set(map(tuple, first))) == 3
    # 14 tokens are the window, of which the first prompt has 6.
    assert [len(answer) for answer in first] == [8, 10, 10] or 3 in sum(first, [])
    for prompt, answer in zip(PROMPTS, first, strict=True):
        assert answer == by_hand(model, prompt, [3], min(10, 14 - len(prompt)))
    # With an end in the middle of the second answer, the others go on to theirs.
    end = first[1][:3][-1]
    model.generation_config.eos_token_id = [end, 63]
    ends = end_tokens(model, tokenizer)
    assert set(ends) == {3, end, 63}
    cut = generate(model, PROMPTS, tokenizer, CPU, 10, 14)
    assert len(cut[1]) <= 3
    for prompt, answer in zip(PROMPTS, cut, strict=True):
        assert answer == by_hand(model, prompt, ends, min(10, 14 - len(prompt)))


def test_a_number_picks_the_token_in_whose_part_it_lies() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    for number, token in ((0.0, 0), (0.49, 0), (0.51, 2), (0.79, 2), (0.81, 3), (1 - 2**-53, 3)):
        pick = Pick(torch.tensor([[0.9, number]], dtype=torch.float64), start=4)
        scores = pick(torch.zeros(1, 5, dtype=torch.long), probabilities.log())
        assert scores.argmax().item() == token and scores[0, token] == 0
        assert scores.isinf().sum() == 3


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.5, 0.0, 0.3, 0.2]),
        (0.5, 1.0, [0.25 / 0.38, 0.0, 0.09 / 0.38, 0.04 / 0.38]),
        (1.0, 0.7, [0.625, 0.0, 0.375, 0.0]),
        (1.0, 0.5, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_is_asked_for(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    rows = 1000
    numbers = ((torch.arange(rows) + 0.5) / rows).double().unsqueeze(1)
    scores = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(rows, 4).clone()
    ids = torch.zeros(rows, 1, dtype=torch.long)
    drawn = drawing(numbers, 1, temperature, top_p)(ids, scores).argmax(-1)
    found = torch.bincount(drawn, minlength=4) / rows
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2 / rows)


def test_drawn_answers_are_the_row_s_own(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever stands beside a row in its batch, and whatever other random numbers are drawn."""
    model = language_model("Llama", 3).eval()
    numbers = torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()

    def said(rows: list[int]) -> list[list[int]]:
        prompts = [PROMPTS[i] for i in rows]
        draw = drawing(numbers[rows], max(map(len, prompts)), 1.0, 0.9)
        return generate(model, prompts, tokenizer, CPU, 8, 64, draw=draw)

    together = said([0, 1, 2])
    assert together == [said([i])[0] for i in range(3)] == said([2, 1, 0])[::-1]
    assert together != generate(model, PROMPTS, tokenizer, CPU, 8, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_to_be_said_and_what_leads_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = {"prompt": "question", "completion": "answer"}
    for pack in (False, True):
        task = task_of(pack=pack, **pairs)
        found = [e for row in rows_of(task, tokenizer, PAIRS) for e in task.examples(row)]
        # Packing puts the longest first, and both have five tokens.
        assert found == [([2, 5, 6], [8, 3]), ([2, 7], [9, 10, 3])]
        assert task.prompted
    assert not task_of().prompted
    row = task.answered([2, 5, 6], [9, 3])
    assert row == {"input_ids": [2, 5, 6, 9, 3], "target": [False] * 3 + [True] * 2}
    # Of a chat the last turn, after the template's opening of it.
    task = task_of(messages="m")
    turns = [("user", "w0"), ("assistant", "w1 w2"), ("user", "w3"), ("assistant", "w4")]
    chat = [{"role": role, "content": text} for role, text in turns]
    (row,) = rows_of(task, tokenizer, {"m": [json.dumps(chat)]}, 32)
    assert list(task.examples(row)) == [([35, 5, 37, 36, 6, 7, 37, 35, 8, 37, 36], [9, 37])]


def test_rouge_by_hand() -> None:
    # Two of two words, of four; one of two, of one; nothing.
    said, meant = ["a c", "x dogs", ""], ["a b c d", "Dog!", "word"]
    expected = (2 / (1 / 1 + 4 / 2) + 2 / (2 / 1 + 1 / 1) + 0) / 3
    assert rouge_l(said, meant)["rougeL"] == pytest.approx(expected)
    # What has no words in these letters is left out.
    assert rouge_l([*said, "日本"], [*meant, "日本"])["rougeL"] == pytest.approx(expected)
    assert rouge_l(["日本"], ["日本"]) == {}
