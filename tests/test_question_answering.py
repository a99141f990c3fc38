"""Windows, spans, and the measures of SQuAD against hand-made numbers."""

import math
from typing import Any

import pytest
import torch
from conftest import WORDS, made_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from mlkd_dist import tasks
from mlkd_dist.config import DataConfig, TaskConfig
from mlkd_dist.losses import load
from mlkd_dist.models.tap import logits_of
from mlkd_dist.tasks import BadRow
from mlkd_dist.tasks.question_answering import exact, words_f1
from mlkd_dist.trace import Trace

PASSAGE = " ".join(WORDS[:20])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def task_of(**settings: Any) -> Any:
    data = DataConfig(train="x", text="question", text_pair="passage", label="answers")
    kind = "question_answering"
    return tasks.load(kind)(TaskConfig(kind=kind, **settings), data)


def answer(*texts: str) -> dict[str, list]:
    return {"text": [*texts], "answer_start": [PASSAGE.index(text) for text in texts]}


def encoded(tokenizer: Any, *answers: dict, length: int = 48, **settings: Any) -> list[dict]:
    rows = {"question": [" w30 w31"] * len(answers), "passage": [PASSAGE] * len(answers)}
    columns = task_of(**settings).encode(rows | {"answers": [*answers]}, tokenizer, length)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_a_short_passage_is_one_window(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = encoded(tokenizer, answer("w3 w4", "w9"))
    # [CLS] w30 w31 [SEP] w0 w1 w2 w3 w4
    assert row["labels"] == [7, 8] and row["answers"] == ["w3 w4", "w9"]
    assert row["spans"][:5] == [[-1, -1]] * 4 + [[0, 2]]
    start, end = row["spans"][7][0], row["spans"][8][1]
    assert PASSAGE[start:end] == "w3 w4"


@pytest.mark.parametrize("text", ["w3 w4 ", " w3 w4", " w3 w4 "])
def test_white_space_around_an_answer_is_left_out(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    (row,) = encoded(tokenizer, answer(text))
    assert row["labels"] == [7, 8]


def test_windows_overlap_and_only_those_with_the_whole_answer_point_at_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = encoded(tokenizer, answer("w6 w7"), answer("w15"), length=13, stride=4)
    # 13 tokens less 5 leave 8 to the passage: w0-w7, w4-w11, w8-w15, w12-w19.
    first, second = rows[:4], rows[4:]
    texts = [[PASSAGE[a:b] for a, b in row["spans"] if a >= 0] for row in first]
    assert texts == [WORDS[k : k + 8] for k in (0, 4, 8, 12)]
    assert [row["labels"] for row in first] == [[10, 11], [6, 7], [0, 0], [0, 0]]
    assert [row["labels"] for row in second] == [[0, 0], [0, 0], [11, 11], [7, 7]]
    assert len({row["example"] for row in first}) == len({row["example"] for row in second}) == 1
    assert first[0]["example"] != second[0]["example"]


def test_an_answer_cut_in_two_is_in_neither_window(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer, answer("w7 w8"), length=13, stride=0)
    assert [row["labels"] for row in rows] == [[0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_batch_points_at_the_tokens(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    rows = encoded(tokenizer, answer("w3 w4"), {"text": [], "answer_start": []})
    short = encoded(tokenizer, answer("w19"), length=13, stride=4)[3:]
    tokenizer.padding_side = side
    batch = task_of().collate([*short, *rows, rows[0]], [True, True, True, False], tokenizer)
    tokenizer.padding_side = "right"
    padding = (batch.inputs["attention_mask"][0] == 0).sum().item() if side == "left" else 0
    ids = batch.inputs["input_ids"]
    assert padding == (12 if side == "left" else 0)
    assert ids[0, batch.labels[0, 0]] == tokenizer.convert_tokens_to_ids("w19")
    assert batch.labels[1].tolist() == [7, 8] and batch.labels[2].tolist() == [0, 0]
    assert batch.labels[3].tolist() == [-100, -100]
    assert batch.label_keep.tolist() == [[True, True]] * 3 + [[False, False]]


def said(tokenizer: Any, rows: list[dict], picks: list[tuple[int, int]]) -> dict[str, Tensor]:
    """What the task makes of logits that are highest at these tokens of each window."""
    task = task_of()
    batch = task.collate(rows, [True] * len(rows), tokenizer)
    mask = batch.inputs["attention_mask"].bool()
    logits = torch.zeros(len(rows), 2, mask.shape[1])
    for i, (start, end) in enumerate(picks):
        logits[i, 0, start], logits[i, 1, end] = 2 + i, 2 + i
    # Padding must not be chosen, however high it is.
    logits = logits.masked_fill(~mask.unsqueeze(1), 100.0)
    trace = Trace(mask, 1, logits=logits.masked_fill(~mask.unsqueeze(1), float("-inf")))
    return task.outputs(trace, batch)


def test_the_best_window_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    task = task_of()
    rows = encoded(tokenizer, answer("w6 w7"), length=13, stride=4)
    # Later windows score higher: the last one says w12 w13.
    outputs = said(tokenizer, rows, [(10, 11), (6, 7), (5, 6), (4, 5)])
    assert task.quality(outputs) == {"em": 0.0, "f1": 0.0}
    right = {name: column[:2] for name, column in outputs.items()}
    assert task.quality(right) == {"em": 100.0, "f1": 100.0}
    assert task.agreement(right, outputs) == {"same_answer": 0.0}
    # Of the first window: of its tokens one has the score 2, the others 0, for start and end each.
    tokens, (start, end) = len(rows[0]["input_ids"]), rows[0]["labels"]
    nothing = math.log(tokens - 1 + math.exp(2))
    expected = nothing - (start == 10) - (end == 11)
    first = {name: column[:1] for name, column in outputs.items()}
    assert task.loss(first) == {"loss": pytest.approx(expected, rel=1e-6)}
    # The same place of the passage through another window is the same answer.
    first = {name: column[:1] for name, column in outputs.items()}
    assert task.agreement(right, first) == {"same_answer": 1.0}


def test_partial_answers_and_the_nearest_of_several(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer, answer("w3 w4 w5"), answer("w9", "w3 w4"))
    found = task_of().quality(said(tokenizer, rows, [(7, 8), (7, 8)]))
    # Two of two words right and two of three found: 0.8; and the second of two answers exactly.
    assert found == {"em": 50.0, "f1": pytest.approx(100 * (0.8 + 1) / 2)}


def test_an_end_before_the_start_is_no_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = encoded(tokenizer, answer("w3 w4"))
    outputs = said(tokenizer, [row], [(8, 7)])
    assert outputs["score"].item() == 2.0 and outputs["end"] > outputs["start"]


def test_silence_counts_where_some_question_has_no_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    none = {"text": [], "answer_start": []}
    rows = encoded(tokenizer, answer("w3 w4"), none, none)
    # The second says nothing, the third, a question of its own, answers.
    rows[2]["example"] += 1
    outputs = said(tokenizer, rows, [(7, 8), (0, 0), (7, 8)])
    assert task_of().quality(outputs) == {
        "em": pytest.approx(200 / 3),
        "f1": pytest.approx(200 / 3),
    }
    # Where every question has an answer, the best span is taken all the same.
    (alone,) = encoded(tokenizer, answer("w3 w4"))
    assert said(tokenizer, [alone], [(0, 0)])["nothing"] == 4.0
    outputs = said(tokenizer, [alone], [(0, 0)])
    assert task_of().agreement(outputs, outputs) == {"same_answer": 1.0}


def test_words_are_compared_as_squad_does() -> None:
    assert exact("The  Eiffel-Tower!", "eiffeltower") == 1.0
    assert exact("a tower", "the tower") == 1.0 and exact("towers", "tower") == 0.0
    assert words_f1("in the old town", "old town") == pytest.approx(0.8)
    assert words_f1("", "old") == 0.0 and words_f1("the", "a") == 1.0


WRONG = {
    "no lists": {"text": "w", "answer_start": 1},
    "one list": {"text": ["w3"], "answer_start": 9},
    "text is a number": {"text": [3], "answer_start": [9]},
    "counted from the end": {"text": ["w19"], "answer_start": [-3]},
    "lengths": {"text": ["w3", "w4"], "answer_start": [9]},
    "another place": {"text": ["w3"], "answer_start": [1]},
    "empty": {"text": [""], "answer_start": [0]},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_answer_is_named(case: str) -> None:
    row = {"question": "w30", "passage": PASSAGE}
    task_of().check(row | {"answers": answer("w3")})
    with pytest.raises(BadRow, match="column 'answers': .* is not an answer; give"):
        task_of().check(row | {"answers": WRONG[case]})


def test_a_question_must_leave_room(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        ValueError, match="'w30 w31' has 2 tokens and leaves 4 .* overlap by 4; set"
    ):
        encoded(tokenizer, answer("w3"), length=9, stride=4)


def test_both_ends_are_distilled_and_padding_is_not() -> None:
    """KL of the starts and of the ends over real tokens, and the labels' cross-entropy."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    raw = torch.randn(2, 2, 2, 4, generator=draw, dtype=torch.float64)
    traces = [
        Trace(mask, 1, logits=logits_of(QuestionAnsweringModelOutput(None, *x), mask)) for x in raw
    ]
    rows = load("soft_labels")(*traces)
    assert rows.shape == (2, 2)
    traces[0].labels = torch.tensor([[1, 3], [0, -100]])
    truth = load("hard_labels")(traces[0])
    for b, n in ((0, 4), (1, 2)):
        for k in (0, 1):
            q, p = (x[k, b, :n].log_softmax(-1) for x in raw)
            assert rows[b, k].item() == pytest.approx((p.exp() * (p - q)).sum().item())
            label = traces[0].labels[b, k]
            expected = 0.0 if label == -100 else -q[label].item()
            assert truth[b, k].item() == pytest.approx(expected)
