"""What a decoder learns from documents, prompts and chats: which token stands where, by hand."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from conftest import made_tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaForCausalLM

from mlkd_dist import tasks
from mlkd_dist.config import DataConfig, TaskConfig, UserError
from mlkd_dist.data import prepare
from mlkd_dist.inputs.columns import Columns
from mlkd_dist.inputs.quarantine import Sieve
from mlkd_dist.inputs.sources import read
from mlkd_dist.models.head import Head
from mlkd_dist.models.tap import capture
from mlkd_dist.student import Student
from mlkd_dist.tasks import BadRow, Batch
from mlkd_dist.tasks.causal_lm import packed
from mlkd_dist.trace import Needs, Trace

pytestmark = pytest.mark.usefixtures("one_process")

# w0 has the number 5; a text begins with [CLS], 2, and ends with [SEP], 3.
TEMPLATE = (
    "{% for m in messages %}{{ 'w30 ' if m.role == 'user' else 'w31 ' }}{{ m.content }} w32 "
    "{% endfor %}{% if add_generation_prompt %}w31 {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


def task_of(**data: Any) -> Any:
    return tasks.load("causal_lm")(TaskConfig(kind="causal_lm"), DataConfig(train="x", **data))


def rows_of(task: Any, tokenizer: Any, raw: dict[str, list], size: int = 16) -> list[dict]:
    columns = task.encode(raw, tokenizer, size)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def batch_of(
    task: Any, tokenizer: Any, raw: dict[str, list], keep: list[bool] | None = None
) -> Batch:
    rows = rows_of(task, tokenizer, raw)
    return task.collate(rows, keep or [True] * len(rows), tokenizer)


DOCUMENTS = {"text": ["w0 w1 w2", "w3"]}


def test_the_label_of_a_token_is_the_next_one(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = batch_of(task_of(), tokenizer, DOCUMENTS)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7, 3, -100], [8, 3, -100, -100, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert torch.equal(batch.label_keep, batch.labels != -100)


def test_left_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    try:
        batch = batch_of(task_of(), tokenizer, DOCUMENTS)
    finally:
        tokenizer.padding_side = "right"
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [0, 0, 2, 8, 3]]
    assert batch.labels.tolist() == [[5, 6, 7, 3, -100], [-100, -100, 8, 3, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    # Positions count from the first real token.
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def test_a_sample_that_fills_the_batch_has_no_label(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = batch_of(task_of(), tokenizer, DOCUMENTS, [True, False])
    assert batch.label_keep.sum(1).tolist() == [4, 0] and batch.mask.sum(1).tolist() == [5, 0]


def test_a_tokenizer_without_a_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """As of GPT-2 and Llama: the end token fills, and is still learned where it is real."""
    before, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        batch = batch_of(task_of(), tokenizer, DOCUMENTS)
    finally:
        tokenizer.pad_token = before
    assert batch.inputs["input_ids"][1].tolist() == [2, 8, 3, 3, 3]
    assert batch.labels[1].tolist() == [8, 3, -100, -100, -100]


def test_a_long_document_goes_on_in_the_next_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    text = " ".join(f"w{i}" for i in range(8))
    rows = rows_of(task_of(), tokenizer, {"text": [text, "w9"]}, size=4)
    assert [row["input_ids"] for row in rows] == [[2, 5, 6, 7], [8, 9, 10, 11], [12, 3], [2, 14, 3]]
    # The first token of a piece follows nothing.
    assert [row["target"][0] for row in rows] == [False] * 4
    assert all(all(row["target"][1:]) for row in rows)


PAIRS = {"question": ["w0 w1", "w2"], "answer": ["w3", "w4 w5"]}


def test_only_completions_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of(prompt="question", completion="answer")
    assert task.columns == ["question", "answer"]
    batch = batch_of(task, tokenizer, PAIRS)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 6, 8, 3], [2, 7, 9, 10, 3]]
    assert batch.labels.tolist() == [[-100, -100, 8, 3, -100], [-100, 9, 10, 3, -100]]


def test_a_completion_is_cut_at_the_window(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of(prompt="question", completion="answer")
    rows = rows_of(task, tokenizer, {"question": ["w0"], "answer": ["w1 w2 w3 w4"]}, size=4)
    assert [row["input_ids"] for row in rows] == [[2, 5, 6, 7]]
    assert rows[0]["target"] == [False, False, True, True]


def test_the_turns_of_the_assistant_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "user", "content": "w0"},
        {"role": "assistant", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
    rows = rows_of(task_of(messages="m"), tokenizer, {"m": [json.dumps(chat)]}, size=32)
    # w30 w0 w32 w31 | w1 w2 w32 | w30 w3 w32 w31 | w4 w32
    assert rows[0]["input_ids"] == [35, 5, 37, 36, 6, 7, 37, 35, 8, 37, 36, 9, 37]
    learned = [t for t, yes in zip(rows[0]["input_ids"], rows[0]["target"], strict=True) if yes]
    assert learned == [6, 7, 37, 9, 37]


def refusal(task: Any, tokenizer: Any, raw: dict[str, list], size: int = 16) -> str:
    with pytest.raises(ValueError) as found:
        task.encode(raw, tokenizer, size)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_bad_rows_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs, chats = task_of(prompt="q", completion="a"), task_of(messages="m")
    said = refusal(pairs, tokenizer, {"q": ["w0 w1"], "a": ["  "]})
    assert "'a'" in said and "prompt 'w0 w1' is empty" in said
    said = refusal(pairs, tokenizer, {"q": ["w0 w1 w2 w3"], "a": ["w1"]}, size=5)
    assert "has 5 tokens" in said and "data.max_length is 5" in said and "raise" in said
    for wrong in ([], [{"role": "user", "content": "w0"}], ["w0"], [{"role": "assistant"}]):
        with pytest.raises(BadRow) as found:
            chats.check({"m": json.dumps(wrong)})
        said = str(found.value)
        assert 'of the role "assistant"' in said and json.dumps(wrong)[:20] in said
    chat = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    before, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        said = refusal(chats, tokenizer, {"m": [json.dumps(chat)]})
        assert "has no chat template" in said
        # A template that leaves out earlier answers.
        tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content if loop.last else ''")
        said = refusal(chats, tokenizer, {"m": [json.dumps(chat * 2)]})
        assert "no longer its beginning" in said and "data.prompt" in said
    finally:
        tokenizer.chat_template = before


CHAT = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_chats_are_read_from_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"chats{ending}"
    if ending == ".jsonl":
        path.write_text(json.dumps({"m": CHAT}) + "\n")
    else:
        datasets.Dataset(pa.table({"m": [CHAT]})).to_parquet(path)

    def rows(column: str, key: str) -> datasets.Dataset:
        return read(Columns(str(path), [column], keys={column: key}), Sieve(str(path)))

    assert json.loads(rows("m", "data.messages")["m"][0]) == CHAT
    with pytest.raises(UserError, match="no column 'n'.*set data.messages"):
        rows("n", "data.messages")
    with pytest.raises(UserError, match="'m' holds .*not text.*data.prompt"):
        rows("m", "data.prompt")


def test_data_with_nothing_to_learn_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    files = []
    for name in ("train", "validation"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps({"text": name}) + "\n")
    before, tokenizer.eos_token = tokenizer.eos_token, None
    # Without special tokens a text of one token is followed by nothing.
    plain = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = None
        with pytest.raises(UserError, match="line 1: .*'train' has 1 token.* nothing to learn"):
            prepare(*map(str, files), 0.1, task_of(), tokenizer, 8, str(tmp_path / "cache"))
    finally:
        tokenizer.eos_token, tokenizer.backend_tokenizer.post_processor = before, plain


def test_measures() -> None:
    """Three tokens of which one is not asked for; the head passes on what enters it."""
    task = task_of()
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.25, 0.25]]
    head = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
    torch.nn.init.eye_(head.weight)
    labels = torch.tensor([[0, 1, -100]])
    mask = torch.ones(1, 3, dtype=torch.long)
    batch = Batch({"attention_mask": mask}, torch.tensor([True]), labels, labels != -100)
    states = torch.tensor([probabilities]).log()
    trace = Trace(mask.bool(), 1, head=Head(head), head_input=states)
    outputs = task.outputs(trace, batch)
    quality = task.quality(outputs)
    assert quality["next_token_accuracy"] == 0.5
    assert quality["perplexity"] == pytest.approx(math.exp(-math.log(0.7 * 0.1) / 2), rel=1e-5)
    assert task.loss(outputs) == {"loss": pytest.approx(-math.log(0.7 * 0.1) / 2, rel=1e-5)}
    other = outputs | {"token": outputs["token"].clone().fill_(0)}
    assert task.agreement(outputs, other) == {"same_token": 0.5}


def test_perplexity_is_that_of_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of a whole model with padding on both sides, against its own logits, text by text."""
    from test_trace import model_of
    from transformers import AutoModelForCausalLM

    model = model_of("GPT2", "mlkd_tap_sdpa", AutoModelForCausalLM).eval()
    texts = ["w0 w1 w2 w3", "w4", "w5 w6"]
    losses = []
    for text in texts:
        ids = torch.tensor([[2, *(int(w[1:]) + 5 for w in text.split()), 3]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses.append(cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = batch_of(task_of(), tokenizer, {"text": texts})
        with torch.no_grad():
            trace = capture(model, model, batch.inputs, Needs(frozenset({"head"})), batch.labels)
            found = task_of().quality(task_of().outputs(trace, batch))
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5), side
    assert tokenizer.padding_side == "right"


def test_packing_fills_sequences() -> None:
    lengths = [3, 5, 2, 8, 1, 4]
    rows = packed(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(6))
    # 23 tokens need three sequences of 8, and get no more.
    assert [sum(lengths[i] for i in row) for row in rows] == [8, 8, 7]


def test_a_packed_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of(pack=True)
    rows = rows_of(task, tokenizer, {"text": ["w0", "w1 w2", "w3 w4 w5 w6"]}, size=8)
    batch = task.collate(rows, [True, True], tokenizer)
    assert batch.inputs["input_ids"].tolist() == [[2, 8, 9, 10, 11, 3, 0], [2, 6, 7, 3, 2, 5, 3]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.inputs["documents"].tolist() == [[0, 0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 1, 1, 1]]
    # No document says how the next one begins.
    assert batch.labels[1].tolist() == [6, 7, 3, -100, 5, 3, -100]
    assert batch.samples.item() == 3
    assert batch.sample_mean.sum().item() == pytest.approx(3)
    assert batch.sample_mean[1].tolist() == pytest.approx([1 / 4] * 4 + [1 / 3] * 3)
    alone = task.collate(rows, [True, False], tokenizer)
    assert alone.samples.item() == 1 and alone.sample_mean[1].sum().item() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_may_count_positions_from_its_padding_on(
    tokenizer: PreTrainedTokenizerBase, side: str
) -> None:
    """As RoBERTa does by itself where it gets none."""
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()
    model.set_attn_implementation("mlkd_tap_sdpa")
    torch.nn.init.normal_(model.roberta.embeddings.position_embeddings.weight)
    tokenizer.padding_side = side
    batch = batch_of(task_of(), tokenizer, {"text": ["w0 w1 w2 w3", "w4 w5"]})
    trace = capture(model, model, batch.inputs, Needs(frozenset({"logits"})), None)
    plain = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model(**plain).logits
    torch.testing.assert_close(trace.logits[batch.mask], expected[batch.mask])


@pytest.mark.parametrize(
    "family", ["GPT2", "OPT", "GPTNeoX", "Llama", "Mistral", "Qwen3", "Phi", "Gemma2"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_as_alone(
    tokenizer: PreTrainedTokenizerBase, family: str, attention: str
) -> None:
    """Loss and gradients of soft labels, hard labels and hidden states, with windows that are
    shorter than a document where the family has them."""
    from test_head import language_model, loss_of, objective_of

    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("caps its scores, which sdpa leaves out")
    changes = {"sliding_window": 3} if family in ("Mistral", "Gemma2") else {}
    # Eager attention takes its softmax in fp32.
    exact = attention == "sdpa"
    student, teacher = (language_model(family, seed, **changes).eval() for seed in (1, 2))
    for model in (student, teacher):
        model.set_attn_implementation(f"mlkd_tap_{attention}")
        model.to(torch.float64 if exact else torch.float32)
    losses: dict[str, dict] = {"soft_labels": {}, "hard_labels": {}, "hidden_mse": {}}
    objective = objective_of(losses)
    raw = {"text": [" ".join(f"w{i + k}" for i in range(n)) for k, n in enumerate((1, 2, 4, 6))]}
    found = []
    for pack in (False, True):
        batch = batch_of(task_of(pack=pack), tokenizer, raw)
        assert len(batch.keep) == (2 if pack else 4)
        loss, shares = loss_of(student, teacher, objective, batch)
        found.append((shares, torch.autograd.grad(loss, student.parameters(), allow_unused=True)))
    (alone, slopes), (together, packed_slopes) = found
    torch.testing.assert_close(together, alone, rtol=1e-6 if exact else 1e-5, atol=0)
    # The gradient of a bias of keys is nothing but rounding.
    largest = max(slope.abs().max().item() for slope in slopes if slope is not None)
    for mine, true in zip(packed_slopes, slopes, strict=True):
        if true is not None:
            atol = (1e-12 if exact else 1e-6) * largest
            torch.testing.assert_close(mine, true, rtol=1e-6 if exact else 1e-3, atol=atol)


LEVELS: dict[str, dict] = {
    "embedding_relation": {"student_scale": 1.0, "teacher_scale": 1.0},
    "attention_relation": {"of": ["query", "key", "value", "context"], "splits": 2},
    "hidden_mse": {},
    "sample_relation": {"of": "last", "normalize": True},
    "sample_contrast": {"of": "mean"},
    "soft_labels": {"kind": "reverse_kl"},
    "hard_labels": {},
}


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama", "Qwen3"])
def test_every_level_is_the_same_on_either_side_of_the_padding(
    tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    """Loss and gradients of a student with fewer key heads than its teacher where the family groups
    them, for texts padded to the right, to the left, and among longer ones that do not count."""
    from test_head import language_model, objective_of

    grouped = {"num_key_value_heads": 4} if family in ("Llama", "Qwen3") else {}
    student = language_model(family, 1).double().eval()
    teacher = language_model(family, 2, **grouped).double().eval()
    objective = objective_of(LEVELS)
    texts = ["w0 w1 w2 w3 w4", "w5 w6", "w7 w8 w9"]
    long = " ".join(f"w{i}" for i in range(12))

    def batch_padded(side: str) -> Batch:
        if side == "more":
            return batch_of(task_of(), tokenizer, {"text": [*texts, long]}, [True] * 3 + [False])
        tokenizer.padding_side = side
        return batch_of(task_of(), tokenizer, {"text": texts})

    found = []
    for side in ("left", "right", "more"):
        batch = batch_padded(side)
        with torch.no_grad():
            seen = capture(teacher, teacher, batch.inputs, objective.needs(1), batch.labels)
        rows, peers = objective.global_rows([batch]), objective.peers([batch], [seen], None)
        loss, shares = Student(student, objective)(batch, seen, rows, peers, 0)
        assert (shares > 1e-4).all(), dict(zip(LEVELS, shares, strict=True))
        found.append((shares, torch.autograd.grad(loss, student.parameters())))
    for shares, slopes in found[1:]:
        # Sample terms are taken in fp32.
        torch.testing.assert_close(shares, found[0][0], rtol=1e-5, atol=1e-6)
        largest = max(slope.abs().max().item() for slope in slopes)
        for mine, true in zip(slopes, found[0][1], strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6 * largest)
