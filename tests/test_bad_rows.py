"""Bad rows among good ones: found with their line and reason, listed, and the rest used as if they
had never been there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, made_tokenizer
from transformers import PreTrainedTokenizerBase

from mlkd_dist import data, tasks
from mlkd_dist.config import Config, DataConfig, TaskConfig, UserError
from mlkd_dist.data import prepare
from mlkd_dist.inputs import sources
from mlkd_dist.inputs.quarantine import Quarantine
from mlkd_dist.rules.settings import mathematics
from mlkd_dist.studies.folder import settings as settings_of_study

SIZE = 16
PASSAGE = " ".join(WORDS[:8])
USER, ROBOT = {"role": "user", "content": "w0"}, {"role": "robot", "content": "w0"}
SAYS = {"role": "assistant", "content": "w1"}
# It refuses what a system says.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none here') }}"
    "{% endif %}{{ 'w30 ' if m.role == 'user' else 'w31 ' }}{{ m.content }} w32 {% endfor %}"
    "{% if add_generation_prompt %}w31 {% endif %}"
)


def classified(**changes: Any) -> dict[str, Any]:
    return {"text": "w0 w1", "other": "w2", "label": 1} | changes


def asked(**changes: Any) -> dict[str, Any]:
    answers = {"text": ["w3"], "answer_start": [9]}
    return {"text": "w30", "other": PASSAGE, "label": answers} | changes


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


# Settings of the task -> those of the data, a good row, and case -> (bad row, of its reason).
PAIRS = {"text_pair": "other"}
KINDS: dict[str, tuple[dict, dict, dict[str, tuple[Any, str]]]] = {
    "classification": (
        PAIRS,
        classified(),
        {
            "no such column": ({"texts": "w", "label": 0}, "no column 'text' (did you mean 'texts"),
            "text null": (classified(text=None), "column 'text' holds null, not text"),
            "text a number": (classified(text=5), "column 'text' holds 5, not text"),
            "text a list": (classified(text=["w1"]), "column 'text' holds [\"w1\"], not text"),
            "text keys": (classified(text={"a": 1}), "column 'text' holds {\"a\": 1}, not text"),
            "text empty": (classified(text=""), "column 'text' is empty"),
            "text blank": (classified(text=" \t\n"), "'text' is empty, but for white space"),
            "NUL": (classified(text="w1\0w2"), "column 'text' holds a NUL character"),
            "surrogate": (classified(text="w1 \ud83d"), "'text' holds half a surrogate pair"),
            "no second text": (without(classified(), "other"), "there is no column 'other'"),
            "second text null": (classified(other=None), "column 'other' holds null, not text"),
            "second text empty": (classified(other=""), "column 'other' is empty"),
            "no label": (without(classified(), "label"), "there is no column 'label'"),
            "label null": (classified(label=None), "column 'label' holds null, not a label"),
            "label a list": (classified(label=[1]), "column 'label' holds [1], not a label"),
            "label true": (classified(label=True), "column 'label' holds true, a truth value"),
            "label in quotes": (classified(label="1"), "'1' is not a class number"),
            "label a name": (classified(label="good"), "'good' is not a class number"),
            "label a fraction": (classified(label=0.5), "0.5 is not a class number"),
            "label outside": (classified(label=3), "label 3 is outside the model's 3 classes"),
            "label negative": (classified(label=-2), "label -2 is below 0"),
            "label huge": (classified(label=2**63), "that 64 bits do not hold"),
            "broken JSON": (b'{"text": "w1", "label"', "not JSON (Expecting ':' delimiter at"),
            "two objects": (b'{"text": "w1"} {"text": "w1"}', "not JSON (Extra data at"),
            "a control byte": (b'{"text": "w1 \x01"}', "not JSON (Invalid control character at"),
            "a list of JSON": (b'["w1", 1]', "JSON but not an object"),
            "a word of JSON": (b"null", "JSON but not an object"),
            "bytes of Latin-1": (b'{"text": "na\xefve", "label": 1}', "not UTF-8 text (invalid"),
            "a mark inside": (b'\xef\xbb\xbf{"text": "w1", "label": 1}', "not JSON ("),
            "endless brackets": (b"[" * 50_000, "not JSON ("),
        },
    ),
    "regression": (
        {},
        {"text": "w0 w1", "label": 0.5},
        {
            "NaN": (b'{"text": "w1", "label": NaN}', "not JSON (NaN is not a JSON value)"),
            "infinite": (b'{"text": "w1", "label": 1e999}', "Infinity, a number without end"),
            "too large": ({"text": "w1", "label": 1e300}, "1e+300 is not a number that can be"),
            "a number in quotes": ({"text": "w1", "label": "2.5"}, "'2.5' is not a number that"),
            "unknown": ({"text": "w1", "label": -100}, "that 32 bits hold, but for -100"),
            "label keys": ({"text": "w1", "label": {"a": 1}}, 'holds {"a": 1}, not a label'),
        },
    ),
    "question_answering": (
        PAIRS,
        asked(),
        {
            "outside": (asked(label={"text": ["w30"], "answer_start": [0]}), "is not an answer"),
            "elsewhere": (asked(label={"text": ["w3"], "answer_start": [8]}), "is not an answer"),
            "behind": (asked(label={"text": ["w3"], "answer_start": [999]}), "is not an answer"),
            "from the end": (asked(label={"text": ["w7"], "answer_start": [-2]}), "not an answer"),
            "more places": (asked(label={"text": ["w3"], "answer_start": [9, 3]}), "not an answer"),
            "no lists": (asked(label={"text": "w3", "answer_start": 9}), "is not an answer"),
            "null text": (asked(label={"text": [None], "answer_start": [9]}), "is not an answer"),
            "empty text": (asked(label={"text": [""], "answer_start": [9]}), "is not an answer"),
            "one key": (asked(label={"text": ["w3"]}), "column 'label' holds {\"text\""),
            "text alone": (asked(label="w3"), "column 'label' holds \"w3\", not a label"),
            "no passage": (without(asked(), "other"), "there is no column 'other'"),
            "empty passage": (asked(other=" "), "column 'other' is empty"),
            "endless passage": (asked(other="w3 " * 70_000), "210000 characters, and 200000 is"),
            "no room": (asked(text="w30 " * 14), "has 14 tokens and leaves -1 of data.max_length"),
        },
    ),
    "causal_lm": (
        {"prompt": "text", "completion": "other", "pack": True},
        {"text": "w0", "other": "w1 w2"},
        {
            "no completion": ({"text": "w0"}, "there is no column 'other'"),
            "empty completion": ({"text": "w0", "other": " "}, "column 'other' is empty"),
            "no room": ({"text": "w0 " * 20, "other": "w1"}, "has 21 tokens ("),
            "prompt null": ({"text": None, "other": "w1"}, "column 'text' holds null, not text"),
        },
    ),
    "chats": (
        {"messages": "text"},
        {"text": [USER, SAYS]},
        {
            "no roles": ({"text": [{"content": "w0"}, SAYS]}, "is not a chat"),
            "no content": ({"text": [USER, {"role": "assistant"}]}, "is not a chat"),
            "no answer": ({"text": [USER]}, "is not a chat"),
            "empty answer": ({"text": [USER, SAYS | {"content": " "}]}, "is not a chat"),
            "no question": ({"text": [SAYS]}, "begins with an answer"),
            "no messages": ({"text": []}, "[] is not a chat"),
            "half a pair": ({"text": [USER | {"content": "\ud83d"}, SAYS]}, "is not a chat"),
            "no list": ({"text": {"role": "user"}}, 'holds {"role": "user"}, not a list of'),
            "text": ({"text": "w0\nw1"}, "w0 w1 is not a chat"),
            "empty role": ({"text": [USER | {"role": ""}, SAYS]}, "'' is no role that the"),
            "unknown role": ({"text": [ROBOT, SAYS]}, "'robot' is no role that the tokenizer's"),
            "refused": ({"text": [USER | {"role": "system"}, SAYS]}, "refuses the chat (none here"),
            "no room": ({"text": [USER | {"content": "w0 " * 20}, SAYS]}, "has 23 tokens ("),
        },
    ),
    "embedding": ({}, {"text": "w0 w1"}, {"empty": ({"text": ""}, "column 'text' is empty")}),
    "masked_lm": ({}, {"text": "w0 w1"}, {"a number": ({"text": 1}, "column 'text' holds 1")}),
    "documents": ({}, {"text": "w0 w1"}, {"blank": ({"text": " "}, "column 'text' is empty")}),
}
CASES = [(kind, case) for kind, (_, _, bad) in KINDS.items() for case in bad]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


def task_of(kind: str) -> Any:
    name = "causal_lm" if kind in ("chats", "documents") else kind
    labels = 3 if kind == "classification" else None
    settings = DataConfig(train="x", **KINDS[kind][0])
    return tasks.load(name)(TaskConfig(kind=name, labels=labels), settings)


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


Prepare = Callable[..., tuple[list, list]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_rows")


@pytest.fixture
def prepared(
    tokenizer: PreTrainedTokenizerBase, base: Path, tmp_path: Path
) -> Callable[..., tuple[list, list, Quarantine]]:
    """Train and validation as they are tokenised, and the bad rows. With a validation file of one
    good row, so that no row is held out."""

    def call(
        kind: str, train: str, max_bad: float = 0, rows: int | None = None, held_out: float = 0
    ) -> tuple[list, list, Quarantine]:
        validation = None if held_out else write(base / f"{kind}.jsonl", [KINDS[kind][1]])
        found = Quarantine(max_bad)
        cache, task = str(tmp_path / "cache"), task_of(kind)
        parts = prepare(
            train, validation, held_out, task, tokenizer, SIZE, cache, rows, quarantine=found
        )
        return *(part.to_list() for part in parts), found

    return call


def listed(found: Quarantine) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found.listed().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_listed_and_the_others_used(
    kind: str, tmp_path: Path, prepared: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, good, bad = KINDS[kind]
    rows, lines = [good], {}
    for case, (row, _) in bad.items():
        # A blank line is no row, and counts where lines are counted.
        rows += [row, b"", good]
        lines[len(rows) - 2] = case
    train, clean = write(tmp_path / "rows.jsonl", rows), [good] * (len(bad) + 1)
    ours, _, found = prepared(kind, train, 0.9)
    theirs, _, none = prepared(kind, write(tmp_path / "clean.jsonl", clean))
    assert ours == theirs and none.counts == {"data.train": 0, "data.validation": 0}
    assert found.counts == {"data.train": len(bad), "data.validation": 0}
    assert found.sieves["data.train"].rows == 2 * len(bad) + 1
    assert [row["line"] for row in listed(found)] == list(lines)
    for row in listed(found):
        wanted, reason = bad[lines[row["line"]]]
        assert row["data"] == "data.train" and row["source"] == train
        assert reason in row["reason"], lines[row["line"]]
        text = wanted.decode(errors="backslashreplace") if isinstance(wanted, bytes) else None
        start = "" if text is None else text.removeprefix("\ufeff")[:300]
        assert start.strip() in row["content"] and len(row["content"]) <= 300

    # From the cache: the same rows, the same list, whatever may be left out; and none is an error.
    monkeypatch.setattr(data, "read", lambda *_: pytest.fail("read again"))
    again, _, later = prepared(kind, train, len(bad))
    assert again == ours and later.listed() == found.listed()
    with pytest.raises(UserError, match=f"line {min(lines)}: .*data.max_bad"):
        prepared(kind, train)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_the_first_bad_row_is_an_error_by_default(
    kind: str, case: str, tmp_path: Path, prepared: Callable
) -> None:
    _, good, bad = KINDS[kind]
    row, reason = bad[case]
    train = write(tmp_path / "rows.jsonl", [good, good, row, good])
    with pytest.raises(UserError) as error:
        prepared(kind, train)
    message = str(error.value)
    assert message.startswith(f"{train!r}, line 3: ") and reason in message
    assert message.endswith(", or have such rows left out with data.max_bad.")
    assert "\n" not in message
    assert not list(tmp_path.glob("cache/*"))


def test_an_answer_may_follow_an_empty_prompt(tmp_path: Path, prepared: Callable) -> None:
    rows = [{"text": "", "other": "w1"}]
    (row,), _, _ = prepared("causal_lm", write(tmp_path / "rows.jsonl", rows))
    assert row["input_ids"] == [2, 6, 3]


def test_long_texts_are_cut_and_not_bad(tmp_path: Path, prepared: Callable) -> None:
    rows = [classified(text="w1 " * 100_000)]
    (row,), _, _ = prepared("classification", write(tmp_path / "rows.jsonl", rows))
    assert len(row["input_ids"]) == SIZE


THREE_OF_TEN = [classified(label=i) for i in (0, 1, 7, 2, 8, 0, 1, 2, 9, 0)]


@pytest.mark.parametrize("enough", [3, 4, 0.3, 0.31])
def test_so_many_bad_rows_are_allowed(enough: float, tmp_path: Path, prepared: Callable) -> None:
    train = write(tmp_path / "rows.jsonl", THREE_OF_TEN)
    rows, _, found = prepared("classification", train, enough)
    assert [row["labels"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert found.counts["data.train"] == 3


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("few", [1, 2, 0.29])
def test_more_than_so_many_end_the_program(
    few: float, cached: bool, tmp_path: Path, prepared: Callable
) -> None:
    train = write(tmp_path / "rows.jsonl", THREE_OF_TEN)
    if cached:
        prepared("classification", train, 5)
    with pytest.raises(UserError) as error:
        prepared("classification", train, few)
    message = str(error.value)
    assert f"data.train: 3 of the 10 rows of {train!r} are bad, more than data.max_bad" in message
    assert f"allows ({few}) (line 3: label 7 is outside" in message and "; line 9: " in message
    assert "raise data.max_bad" in message and "\n" not in message
    (path,) = tmp_path.glob("cache/quarantine-*.jsonl")
    assert repr(str(path)) in message
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["line"] for row in rows] == [3, 5, 9]


def test_only_bad_rows_are_always_an_error(tmp_path: Path, prepared: Callable) -> None:
    """Also where all are refused with the tokenizer at hand, and where the bad are held out."""
    train = write(tmp_path / "rows.jsonl", [classified(label=5), b"{", classified(text="")])
    with pytest.raises(UserError, match="3 of the 3 rows .* are bad, which leaves no row to use"):
        prepared("classification", train, 10)
    long = KINDS["causal_lm"][2]["no room"][0]
    train = write(tmp_path / "long.jsonl", [long | {"other": f"w{i}"} for i in range(4)])
    with pytest.raises(
        UserError, match="4 of the 4 rows .* leaves no row to use .line 1: .*correct"
    ):
        prepared("causal_lm", train, 10)
    with pytest.raises(UserError, match=r"\d of the 4 rows .* which leaves no row to use"):
        prepared("causal_lm", train, 10, held_out=0.5)


def texts(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


def test_what_is_held_out_does_not_depend_on_bad_rows(tmp_path: Path, prepared: Callable) -> None:
    good = [{"text": f"w{i} w{i + 1}", "label": i / 2} for i in range(20)]
    mixed = [row for each in good for row in (each, b"{", {"text": "", "label": 1})]
    clean = prepared("regression", write(tmp_path / "clean.jsonl", good), held_out=0.25)
    train = write(tmp_path / "mixed.jsonl", mixed)
    ours = prepared("regression", train, 0.7, held_out=0.25)
    assert ours[:2] == clean[:2] and len(ours[1]) == 5
    # Both parts are made without them, and they are counted once.
    assert ours[2].counts == {"data.train": 40}
    # One part from the cache, the other new: of both again, and not of the part alone.
    few = prepared("regression", train, 0.7, rows=6, held_out=0.25)
    assert few[1] == ours[1] and few[2].listed() == ours[2].listed()


def test_rows_of_a_smaller_number_are_good_ones(tmp_path: Path, prepared: Callable) -> None:
    """Every second prompt is too long: those that are met on the way are left out and counted."""
    rows = [{"text": "w0 " * (20 * (i % 2)) + f"w{i}", "other": f"w{i}"} for i in range(20)]
    train = write(tmp_path / "rows.jsonl", rows)
    every = prepared("causal_lm", train, 0.5)
    assert every[2].counts["data.train"] == 10
    some = {count: prepared("causal_lm", train, 0.5, rows=count) for count in (3, 7, 10)}
    learned = {
        count: {token for row in found[0] for token in row["input_ids"]}
        for count, found in some.items()
    }
    # Prompt and completion hold the same word: as many words as rows.
    words = {count: len(seen - {2, 3}) for count, seen in learned.items()}
    assert words == {3: 3, 7: 7, 10: 10}
    assert learned[3] < learned[7] < learned[10]
    counts = [found[2].counts["data.train"] for found in some.values()]
    assert counts == sorted(counts) and counts[-1] <= 10
    with pytest.raises(UserError, match="data.train_rows: 11 is more than the 10 good rows"):
        prepared("causal_lm", train, 0.5, rows=11)


def test_how_many_may_be_left_out_may_change() -> None:
    """While a run goes on, and in a study whose runs are there already."""
    few, many = Config(), Config()
    many.data.max_bad = 100
    assert mathematics(few) == mathematics(many)
    assert settings_of_study(few) == settings_of_study(many)


# Other sources


def test_bad_lines_of_text(tmp_path: Path, prepared: Callable) -> None:
    (tmp_path / "rows.txt").write_bytes(b"w0\n\nna\xefve\nw1\0\n \nw2\n\xff\xfe\nw3")
    rows, _, found = prepared("embedding", str(tmp_path / "rows.txt"), 3)
    assert texts(rows) == [[2, i, 3] for i in (5, 7, 8)]
    assert [(row["line"], row["reason"][:20]) for row in listed(found)] == [
        (3, "it is not UTF-8 text"),
        (4, "column 'text' holds a NUL"[:20]),
        (7, "it is not UTF-8 text"),
    ]
    assert listed(found)[0]["content"] == "na\\xefve\n" and found.sieves["data.train"].rows == 6


def test_lines_that_never_end_are_not_read_whole(
    tmp_path: Path, prepared: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 30)
    for size in (29, 30, 31, 60, 61, 95):
        # Of `size` bytes with its newline.
        train = write(tmp_path / f"{size}.txt", [b"w0", b"w1".ljust(size - 1, b"x"), b"w2"])
        rows, _, found = prepared("embedding", train, 1)
        assert len(rows) == (3 if size == 29 else 2) and texts(rows)[-1] == [2, 7, 3]
        assert [row["line"] for row in listed(found)] == ([] if size == 29 else [2])
    write(tmp_path / "last.txt", [b"w0", b"w1" * 50])
    assert texts(prepared("embedding", str(tmp_path / "last.txt"), 1)[0]) == [[2, 5, 3]]


@pytest.mark.parametrize("hub", [False, True])
def test_bad_rows_of_tables(
    hub: bool, tmp_path: Path, prepared: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number is that of the row; text columns of parquet files may hold any bytes."""
    broken = pa.array([b"w0", b"w1", None, b"\xff", b" ", b"w5", b"w6"]).cast(pa.binary())
    buffers = broken.buffers()
    text = pa.Array.from_buffers(pa.string(), len(broken), buffers)
    labels = pa.array([0.5, float("nan"), 1.0, 1.0, 1.0, None, 2.0])
    table = pa.table({"text": text, "label": labels, "more": pa.array(range(7))})
    source = "owner/rows"
    if hub:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    else:
        source = str(tmp_path / "rows.parquet")
        pq.write_table(table, source)
    rows, _, found = prepared("regression", source, 5)
    assert [(row["input_ids"], row["labels"]) for row in rows] == [
        ([2, 5, 3], 0.5),
        ([2, 11, 3], 2),
    ]
    assert [(row["row"], row["reason"]) for row in listed(found)] == [
        (2, "column 'label' holds NaN, a number without end, not a label"),
        (3, "column 'text' holds null, not text"),
        (4, "it is not UTF-8 text"),
        (5, "column 'text' is empty, but for white space"),
        (6, "column 'label' holds null, not a label"),
    ]
    with pytest.raises(UserError, match=f"{source}', row 4: it is not UTF-8|row 2: .*NaN"):
        prepared("regression", source)


def test_chats_of_parquet(tmp_path: Path, prepared: Callable) -> None:
    chats = [[USER, SAYS], [USER], None, [ROBOT, SAYS], [SAYS]]
    source = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": chats}), source)
    rows, _, found = prepared("chats", source, 4)
    assert len(rows) == 1 and [row["row"] for row in listed(found)] == [2, 3, 4, 5]
