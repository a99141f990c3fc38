"""What of a model shows, before its weights load, that it does not suit the task, the tokenizer or
the losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BERT, made_tokenizer, run_config, write_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from mlkd_dist.config import UserError, from_mapping
from mlkd_dist.models.suited import check_model
from mlkd_dist.preflight import prepared
from mlkd_dist.processes.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
HEADS = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "causal_lm": AutoModelForCausalLM,
}


@pytest.fixture
def checked(teachers: dict, data: dict, tmp_path: Path) -> Callable[..., None]:
    def checked(task: str, found: Any, tokenizer: Any, **losses: Any) -> None:
        columns = {"question_answering": {"text_pair": "other"}, "regression": {"label": "score"}}
        given = run_config(tmp_path, teachers[task], data | columns.get(task, {}), task)
        given["stages"] = [{"steps": 1, "losses": losses or {"hidden_mse": {}}}]
        config = from_mapping(given)
        with torch.device("meta"):
            model = HEADS[task].from_config(found)
        check_model(config, tokenizer, "mine", model)

    return checked


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("pad", [None, 3])
def test_a_decoder_that_would_answer_at_padding_is_refused(
    checked: Callable, tmp_path: Path, task: str, pad: int | None
) -> None:
    tokenizer = made_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 0
    with pytest.raises(UserError, match=f"by its padding token {pad}, .* pads with 0; use a copy"):
        checked(task, LlamaConfig(**BERT, pad_token_id=pad), tokenizer)
    checked(task, LlamaConfig(**BERT, pad_token_id=0), tokenizer)
    # These do not look for the last token.
    checked(task, BertConfig(**BERT | {"pad_token_id": pad}), tokenizer)
    checked("question_answering", LlamaConfig(**BERT, pad_token_id=pad), tokenizer)


def test_a_tokenizer_without_padding_is_refused_but_for_causal_lm(
    checked: Callable, tmp_path: Path
) -> None:
    tokenizer = made_tokenizer(tmp_path)
    tokenizer.pad_token = None
    llama = LlamaConfig(**BERT, pad_token_id=None)
    for task in ("classification", "question_answering"):
        with pytest.raises(UserError, match=f"has no padding token, which task.kind {task} needs"):
            checked(task, llama, tokenizer)
    checked("causal_lm", llama, tokenizer)


@pytest.mark.parametrize("name", ["cls_cosine", "sample_relation", "sample_contrast"])
def test_the_first_token_of_a_decoder_says_nothing(
    checked: Callable, tmp_path: Path, name: str
) -> None:
    tokenizer = made_tokenizer(tmp_path)
    llama, bert = LlamaConfig(**BERT, pad_token_id=0), BertConfig(**BERT)
    with pytest.raises(UserError, match=rf"losses\.{name}\.of: cls .* decoder\); use last or mean"):
        checked("classification", llama, tokenizer, **{name: {}})
    checked("classification", llama, tokenizer, **{name: {"of": "last"}})
    checked("classification", bert, tokenizer, **{name: {}})


def test_it_is_looked_at_before_a_run(one_process: None, tmp_path: Path, data: dict) -> None:
    found = LlamaConfig(**BERT, num_labels=3, pad_token_id=3)
    teacher = write_model(tmp_path / "llama", found, AutoModelForSequenceClassification)
    config = from_mapping(run_config(tmp_path, teacher, data))
    with pytest.raises(UserError, match=f"{teacher}.*padding token 3"):
        prepared(config, ALONE, str(teacher))


def test_labels_that_are_all_unknown_teach_nothing(
    one_process: None, tmp_path: Path, data: dict
) -> None:
    rows = tmp_path / "unknown.jsonl"
    rows.write_text("".join(f'{{"text": "w{i} w{i + 1}", "label": -1}}\n' for i in range(8)))
    teacher = write_model(
        tmp_path / "bert", BertConfig(**BERT, num_labels=3), AutoModelForSequenceClassification
    )
    given = run_config(tmp_path, teacher, data | {"train": str(rows)})
    with pytest.raises(UserError, match="data.train: no label of .* is known"):
        prepared(from_mapping(given), ALONE, str(teacher))
    del given["stages"][0]["losses"]["hard_labels"]
    prepared(from_mapping(given), ALONE, str(teacher))
