"""Tasks: what they make of text, which rows count, and their measures against hand-made numbers."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_tokenizer
from scipy.stats import rankdata
from transformers import PreTrainedTokenizerBase

from mlkd_dist import tasks
from mlkd_dist.config import DataConfig, TaskConfig
from mlkd_dist.models.head import Head
from mlkd_dist.trace import Trace


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def task_of(kind: str, **settings: Any) -> Any:
    return tasks.load(kind)(TaskConfig(kind=kind, **settings), DataConfig(train="x"))


def rows_of(task: Any, tokenizer: Any, raw: dict[str, list]) -> list[dict[str, Any]]:
    columns = task.encode(raw, tokenizer, 16)
    count = len(next(iter(columns.values())))
    return [
        {name: column[i] for name, column in columns.items()} | {"row": i, "epoch": 0}
        for i in range(count)
    ]


TEXTS = ["w0 w1 w2", "w3", "w4 w5 w6 w7 w8"]


def test_classification_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of("classification")
    rows = rows_of(task, tokenizer, {"text": TEXTS, "label": [2, -1, 1]})
    batch = task.collate(rows, [True, True, False], tokenizer)
    assert batch.inputs["input_ids"].shape == (3, 7)
    assert batch.mask.sum(1).tolist() == [5, 3, 0]
    # -1 is GLUE's unknown; a sample that only fills the batch has no label.
    assert batch.labels.tolist() == [2, -100, -100]
    assert batch.label_keep.tolist() == [True, True, False]


def test_classification_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(train="x", text="a", text_pair="b", label="y")
    task = tasks.load("classification")(TaskConfig(kind="classification"), data)
    assert task.columns == ["a", "b", "y"]
    rows = rows_of(task, tokenizer, {"a": ["w0"], "b": ["w1 w2"], "y": [0]})
    assert rows[0]["input_ids"] == [2, 5, 3, 6, 7, 3]


def test_classification_measures() -> None:
    task = task_of("classification")
    log_prob = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]]).log()
    outputs = {
        "class": log_prob.argmax(-1),
        "log_prob": log_prob,
        "label": torch.tensor([0, 1, 0, -100]),
    }
    found = task.quality(outputs)
    # Of the three known: one true positive, one false positive, one true negative.
    assert found["accuracy"] == pytest.approx(2 / 3) and found["f1"] == pytest.approx(2 / 3)
    assert found["mcc"] == pytest.approx((1 * 1 - 1 * 0) / np.sqrt(2 * 1 * 2 * 1))
    assert task.agreement(outputs, outputs) == {"same_class": 1.0, "kl": pytest.approx(0, abs=1e-7)}
    assert task.loss(outputs) == {"loss": pytest.approx(-np.log(0.9 * 0.8 * 0.4) / 3)}
    assert task.loss(outputs | {"label": torch.full((4,), -100)}) == {}
    flipped = outputs | {"class": 1 - outputs["class"], "log_prob": log_prob.flip(-1)}
    kl = (log_prob.exp() * (log_prob - log_prob.flip(-1))).sum(-1).mean()
    found = task.agreement(flipped, outputs)
    assert found == {"same_class": 0.0, "kl": pytest.approx(kl.item())}


def test_regression_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(train="x", text="a", text_pair="b", label="score")
    task = tasks.load("regression")(TaskConfig(kind="regression"), data)
    raw = {"a": TEXTS, "b": ["w9", "w8 w7", "w6"], "score": [2.5, 0, -1]}
    rows = rows_of(task, tokenizer, raw)
    batch = task.collate(rows, [True, True, False], tokenizer)
    assert batch.inputs["input_ids"][1].tolist()[:6] == [2, 8, 3, 13, 12, 3]
    assert batch.labels.tolist() == [2.5, 0.0, -100.0] and batch.labels.dtype == torch.float32
    assert batch.label_keep.tolist() == [True, True, False]


@pytest.mark.parametrize("wrong", ["3", True, float("nan"), -1e300, 2**60, -100])
def test_a_regression_label_that_is_no_number_is_named(wrong: Any) -> None:
    task_of("regression").check({"text": "w0", "label": 2.5})
    with pytest.raises(tasks.BadRow, match=re.escape(f"'label': {wrong!r} is not a num")):
        task_of("regression").check({"text": "w0", "label": wrong})


def test_regression_measures() -> None:
    task = task_of("regression")
    truth, said = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.5, 4.0, 3.0])
    batch = tasks.Batch({}, torch.tensor([True] * 4 + [False]), torch.zeros(5), torch.ones(5))
    batch.labels[:4] = truth
    trace = Trace(torch.ones(5, 1).bool(), 1, logits=torch.cat([said, said[:1]]).unsqueeze(1))
    outputs = task.outputs(trace, batch)
    assert outputs["value"].tolist() == said.tolist()
    found = task.quality(outputs)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, said)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 4, 3])[0, 1])
    agreement = task.agreement(outputs, outputs | {"value": truth})
    assert agreement["mse"] == pytest.approx((1 + 0.25 + 4 + 4) / 4)
    assert agreement["pearson"] == pytest.approx(found["pearson"])
    assert task.loss(outputs) == {"loss": agreement["mse"]}
    # The same number for every text has no correlation with anything.
    assert task.quality(outputs | {"value": torch.ones(4)}) == {}
    assert task.quality(outputs | {"value": said / 0 * 0}) == {}
    # A large mean and a small spread.
    near = {"value": 1e6 + torch.tensor([0.0, 0.0625, 0.125]), "label": torch.arange(3.0)}
    assert task.quality(near)["pearson"] == pytest.approx(1)


def test_labels_outside_the_head_are_named() -> None:
    task = task_of("classification", labels=3)
    for label in (0, 2, -1):
        task.check({"label": label})
    with pytest.raises(tasks.BadRow, match=r"label 3 is outside the model's 3 classes \(0 to 2\)"):
        task.check({"label": 3})
    # Where no model says how many there are, labels do.
    task_of("classification").check({"label": 3})


def test_embedding_vectors_and_agreement(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of("embedding", pooling="cls")
    rows = rows_of(task, tokenizer, {"text": TEXTS})
    batch = task.collate(rows, [True, False, True], tokenizer)
    assert batch.labels is None and task.reads == {"cls"}
    trace = Trace(batch.inputs["attention_mask"].bool(), 1, vectors={"cls": torch.randn(3, 4)})
    vectors = task.outputs(trace, batch)["vector"]
    assert vectors.shape == (2, 4)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))

    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(6, 5, generator=draw) for _ in range(2))
    pairs = [(i, j) for i in range(6) for j in range(i)]
    ranks = [rankdata([float(m[i] @ m[j]) for i, j in pairs]) for m in (ours, theirs)]
    expected = np.corrcoef(*ranks)[0, 1]
    found = task.agreement({"vector": ours}, {"vector": theirs})
    assert found == {"spearman": pytest.approx(expected)}
    # A turned space relates the texts as before.
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draw))[0]
    assert task.agreement({"vector": ours @ turn}, {"vector": ours})["spearman"] > 0.999
    # Not defined: of one pair, or where all texts are the same to the student.
    for vectors in (ours[:2], torch.ones(6, 5)):
        assert task.agreement({"vector": vectors}, {"vector": theirs[: len(vectors)]}) == {}
    many = torch.randn(2001, 2, generator=draw)
    assert task.agreement({"vector": many}, {"vector": many[:2000]})["spearman"] > 0.999


def test_masked_lm_hides_by_row_and_epoch_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of("masked_lm", mask_probability=0.5)
    texts = [" ".join(f"w{i}" for i in range(14))] * 3
    rows = rows_of(task, tokenizer, {"text": texts})
    together = task.collate(rows, [True] * 3, tokenizer)
    alone = task.collate(rows[1:2], [True], tokenizer)
    assert torch.equal(together.inputs["input_ids"][1], alone.inputs["input_ids"][0])
    assert torch.equal(together.labels[1], alone.labels[0])
    # The same text in another row, and in another epoch, is hidden elsewhere.
    assert not torch.equal(together.labels[0], together.labels[1])
    later = task.collate([rows[1] | {"epoch": 1}], [True], tokenizer)
    assert not torch.equal(later.labels, alone.labels)


def test_masked_lm_labels_are_the_hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of("masked_lm", mask_probability=0.3)
    texts = [" ".join(f"w{(i + k) % 40}" for i in range(14)) for k in range(400)]
    rows = rows_of(task, tokenizer, {"text": texts})
    batch = task.collate(rows, [True] * 399 + [False], tokenizer)
    truth = torch.tensor([row["input_ids"] for row in rows])
    seen, hidden = batch.inputs["input_ids"], batch.label_keep
    assert torch.equal(batch.labels[hidden], truth[hidden])
    # The last row only fills the batch.
    assert torch.equal(seen[:-1][~hidden[:-1]], truth[:-1][~hidden[:-1]])
    assert not hidden[-1].any() and not hidden[:, [0, -1]].any()
    # 399 x 14 tokens: three standard deviations of the share are 0.02.
    assert hidden[:399, 1:-1].float().mean().item() == pytest.approx(0.3, abs=0.02)
    masked = (seen[hidden] == tokenizer.mask_token_id).float().mean().item()
    kept = (seen[hidden] == truth[hidden]).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)


def test_masked_lm_measures() -> None:
    task = task_of("masked_lm")
    # What enters the head, a head that passes it on, and what is said of the three tokens.
    logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]]))
    head = torch.nn.Linear(3, 3).requires_grad_(False)
    torch.nn.init.eye_(head.weight)
    torch.nn.init.zeros_(head.bias)
    labels = torch.tensor([[0, 1, -100]])
    batch = tasks.Batch(
        {"attention_mask": torch.ones(1, 3, dtype=torch.long)},
        torch.tensor([True]),
        labels,
        labels != -100,
    )
    trace = Trace(torch.ones(1, 3, dtype=torch.bool), 1, head=Head(head), head_input=logits)
    found = task.quality(task.outputs(trace, batch))
    assert found["masked_accuracy"] == 0.5
    assert found["perplexity"] == pytest.approx((0.7 * 0.1) ** -0.5, rel=1e-5)
    loss = task.loss(task.outputs(trace, batch))["loss"]
    assert loss == pytest.approx(-np.log(0.7 * 0.1) / 2, rel=1e-5)
