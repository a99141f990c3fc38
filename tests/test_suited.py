"""What of a model shows, before its weights load, that it does not suit the task, the tokenizer or
the losses; and what is made to suit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BERT, made_tokenizer, run_config, write_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    pipeline,
)

from mlkd_dist.checkpoint import export
from mlkd_dist.config import UserError, from_mapping
from mlkd_dist.models.model import refuse_other_tokenizer
from mlkd_dist.models.suited import (
    check_attends,
    check_direction,
    check_maps,
    check_matrices,
    check_model,
)
from mlkd_dist.preflight import prepared
from mlkd_dist.processes.world import World
from mlkd_dist.stage import trainable

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


TINY = BERT | {"hidden_size": 32, "num_key_value_heads": 2, "num_hidden_layers": 2}
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[0])
HYBRIDS = {
    "lfm2": dict(layer_types=["full_attention", "conv"]),
    "minimax": dict(num_local_experts=2, num_experts_per_tok=1),
    "granitemoehybrid": dict(
        layer_types=["attention", "mamba"], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, num_local_experts=0,
    ),
}  # fmt: skip


def decoder(kind: str, **changes: Any) -> Any:
    with torch.device("meta"):
        found = AutoConfig.for_model(kind, **TINY | changes)
        return AutoModelForCausalLM.from_config(found)


def packing(folder: Path, teachers: dict, data: dict, pack: bool) -> Any:
    given = run_config(folder, teachers["causal_lm"], data | {"pack": pack}, "causal_lm")
    given["stages"] = [{"steps": 1, "losses": {"soft_labels": {}}}]
    return from_mapping(given)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_in_which_packed_documents_would_meet_are_refused(
    kind: str, tmp_path: Path, teachers: dict, data: dict
) -> None:
    model = decoder(kind, **HYBRIDS[kind])
    with pytest.raises(
        UserError, match=r"'mine': layer \d .* more than attention .* data.pack=false"
    ):
        check_direction(model, "mine", packing(tmp_path, teachers, data, True))
    check_direction(model, "mine", packing(tmp_path, teachers, data, False))
    for other in ("llama", "gpt2", "gpt_neox", "opt", "phi", "gemma2", "mistral", "qwen3"):
        check_direction(decoder(other), "mine", packing(tmp_path, teachers, data, True))


def test_layers_without_attention_are_not_compared_by_it() -> None:
    model = decoder("lfm2", **HYBRIDS["lfm2"])
    check_attends("here", [(0, 0)], model, model)
    for pair in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="here: layer 1 of Lfm2ForCausalLM has no attention"):
            check_attends("here", [(0, 0), pair], model, model)


def test_matrices_are_looked_for_in_every_layer() -> None:
    model = decoder("qwen3_moe", **EXPERTS)
    check_matrices("here", None, [(0, 0)], model, model)
    check_matrices("here", ["query", "output"], [(0, 0), (1, 1)], model, model)
    for of in (None, ["query", "up"]):
        with pytest.raises(UserError, match="here.of: Qwen3Moe.* no matrix (gate|up) in layer 1"):
            check_matrices("here", of, [(0, 0), (1, 1)], model, model)


def test_queries_joined_with_fewer_keys_are_not_taken_apart() -> None:
    model = decoder("gpt_bigcode", multi_query=True)
    check_matrices("here", ["up"], [(0, 0)], model, model)
    for of in (None, ["key"]):
        with pytest.raises(UserError, match="joins queries with fewer keys and values in attn.c_a"):
            check_matrices("here", of, [(0, 0)], model, model)
    even = decoder("gpt_bigcode", multi_query=False)
    check_matrices("here", ["up"], [(0, 0)], even, even)


@pytest.mark.parametrize("name", ["attention_kl", "attention_mse"])
def test_maps_that_also_go_to_sinks_are_not_compared(
    tmp_path: Path, teachers: dict, data: dict, name: str
) -> None:
    model = decoder("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=64)
    given = run_config(tmp_path, teachers["causal_lm"], data, "causal_lm", student={})
    given["student"] = {"from_teacher": {"layers": 2}}
    given["stages"] = [{"steps": 1, "losses": {name: {}}}]
    with pytest.raises(UserError, match=f"losses.{name}: in model 'mine' attention also goes to s"):
        check_maps(from_mapping(given), "mine", model)
    check_maps(from_mapping(given), "mine", decoder("llama"))
    given["stages"] = [{"steps": 1, "losses": {"attention_relation": {}}}]
    check_maps(from_mapping(given), "mine", model)


@pytest.fixture
def pair(tmp_path: Path, data: dict) -> tuple[dict, Path]:
    """A run with pairs of texts and a student of another family, whose tokenizer gives no token
    types and whose classes have other names."""
    names = {i: name for i, name in enumerate(("no", "maybe", "yes"))}
    teacher = write_model(
        tmp_path / "bert",
        BertConfig(**BERT, id2label=names, label2id={n: i for i, n in names.items()}),
        AutoModelForSequenceClassification,
    )
    distil = DistilBertConfig(
        vocab_size=64, dim=24, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64,
        id2label={0: "yes", 1: "no", 2: "maybe"}, label2id={"yes": 0, "no": 1, "maybe": 2},
    )  # fmt: skip
    student = write_model(tmp_path / "distil", distil, AutoModelForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(student)
    given = run_config(tmp_path, teacher, data | {"text_pair": "other"})
    given["student"] = {"path": str(student), "dropout": False, "zero_stage": 0}
    return given, student


def test_a_teacher_gets_token_types_of_which_its_student_knows_nothing(
    one_process: None, tmp_path: Path, pair: tuple
) -> None:
    given, student = pair
    given["stages"] = [{"steps": 1, "losses": {"soft_labels": {}}}]
    run = prepared(from_mapping(given), ALONE, str(student))
    batch = run.task.collate([run.train[i] for i in range(4)], [True] * 4, run.tokenizer)
    types = batch.inputs["token_type_ids"]
    assert set(types.flatten().tolist()) == {0, 1}
    model = trainable(run, str(student))
    export(model, model.state_dict(), run.tokenizer, tmp_path / "export")
    assert "token_type_ids" in run.tokenizer.model_input_names
    said = pipeline("text-classification", str(tmp_path / "export"))(
        {"text": "w1", "text_pair": "w2"}
    )
    assert said["label"] in ("no", "maybe", "yes")
    ours = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert ours.model_input_names == ["input_ids", "attention_mask"]


def test_a_student_learns_the_classes_of_its_teacher(
    one_process: None, tmp_path: Path, pair: tuple
) -> None:
    given, student = pair
    given["stages"] = [{"steps": 1, "losses": {"soft_labels": {}}}]
    run = prepared(from_mapping(given), ALONE, str(student))
    model = trainable(run, str(student))
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}


def test_token_types_must_mean_the_same(tmp_path: Path) -> None:
    theirs, ours = (made_tokenizer(tmp_path / name) for name in "ts")
    refuse_other_tokenizer(theirs, ours, "t", "s")
    ours.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    with pytest.raises(UserError, match="lower case, special tokens, or token types"):
        refuse_other_tokenizer(theirs, ours, "t", "s")
    # Which the teacher does not take.
    theirs.model_input_names = ["input_ids", "attention_mask"]
    refuse_other_tokenizer(theirs, ours, "t", "s")


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
