import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlkd_dist import data
from mlkd_dist.config import UserError
from mlkd_dist.data import prepare, split
from mlkd_dist.inputs import builtin_text
from mlkd_dist.inputs.batches import Sampler, batches
from mlkd_dist.inputs.columns import LINE, Columns
from mlkd_dist.inputs.quarantine import Sieve
from mlkd_dist.inputs.sources import read as read_rows
from mlkd_dist.inputs.sources import unit

ROWS = [{"text": f"word{i} word{i + 1}", "label": i % 3, "other": None} for i in range(20)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_tokenizer(words: int = 40) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "[PAD]": 1} | {f"word{i}": i + 2 for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )


def read(source: str, columns: list[str], label: str | None = None) -> datasets.Dataset:
    """The rows of a source that may have no bad ones."""
    found = read_rows(Columns(source, columns, label), Sieve(source, unit(source)))
    return found.remove_columns(LINE)


class FakeTask:
    columns = ["text", "label"]
    label = "label"

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.encoded_rows = 0

    def settings(self) -> dict[str, Any]:
        return self._settings

    def check(self, row: dict[str, Any]) -> None:
        pass

    def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]:
        self.encoded_rows += len(rows["text"])
        encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
        return {"input_ids": encoded["input_ids"], "labels": rows["label"]}


# Sources


def test_every_kind_of_file_gives_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a first line", "ünïcode and  two spaces", "U+2028 \u2028 inside"]
    rows = [{"other": i, "text": text, "label": i} for i, text in enumerate(texts)]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", rows)
    # A byte-order mark, blank lines and a missing last newline are what real files have.
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.json").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "rows.txt").write_text("\n  \n".join(texts) + "\n", encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "shipped_rows").mkdir()
    (tmp_path / "shipped_rows" / "__init__.py").touch()
    write_jsonl(tmp_path / "shipped_rows" / "part.jsonl", rows)
    monkeypatch.syspath_prepend(tmp_path)

    wanted = {"text": texts, "label": [0, 1, 2]}
    for source in (jsonl, tmp_path / "rows.json", tmp_path / "rows.parquet"):
        assert read(str(source), ["text", "label"], "label").to_dict() == wanted
    assert read("package:shipped_rows/part.jsonl", ["text"]).to_dict() == {"text": texts}
    assert read(str(tmp_path / "rows.txt"), ["text"]).to_dict() == {"text": texts}


def test_jsonl_longer_than_one_chunk_keeps_order_and_mixed_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i if i < 15_000 else i + 0.5} for i in range(25_000)]
    found = read(write_jsonl(tmp_path / "long.jsonl", rows), ["text", "label"], "label")
    assert found["text"][:] == [row["text"] for row in rows]
    assert found["label"][:] == [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [("glue:sst2@train", "sst2", "train"), ("owner/set-2.5", None, "train"), ("a/b@x", None, "x")],
)
def test_hub_names(
    name: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a", "idx": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(name, ["text"]).to_dict() == {"text": ["a"]}
    assert asked == [((name.split(":")[0].split("@")[0], config), {"split": split})]


def test_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("\nCouldn't reach 'glue'\nand a long tale")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        read("glue:sst2", ["text"])
    message = str(error.value)
    assert "'glue:sst2'" in message and "config sst2, split train" in message
    assert message.endswith("Couldn't reach 'glue'") and "\n" not in message


BAD_FILES = {
    "ending.csv": (b"a,b\n", ["'.*ending.csv'", ".jsonl, .json, .txt or .parquet"]),
    "empty.jsonl": (b"", ["empty.jsonl.* is empty"]),
    "blank.jsonl": (b"\n \n", ["blank.jsonl.* is empty"]),
    "broken.jsonl": (
        b'{"text": "a", "label": 1}\n\n{"text": "b" "label": 1, "pad": "' + b"x" * 99 + b'"}\n',
        ["line 3: it is not JSON", "at character 14", '\'{"text": "b" "label": 1, "pad": "x{27}\''],
    ),
    "array.json": (
        b'[{"text": "a"}]\n',
        ["line 1: it is JSON but not an object", "one JSON object per"],
    ),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', ["line 1: it is not JSON", "NaN"]),
    "latin.jsonl": (b'{"text": "a", "label": 1}\nna\xefve\n', ["line 2: it is not UTF-8"]),
    "misspelt.jsonl": (
        b'{"texts": "a", "label": 1}\n',
        [
            "line 1: there is no column 'text' .did you mean 'texts'.., but: texts, label; ",
            "set data.text ",
        ],
    ),
    "unlabelled.jsonl": (
        b'{"text": "a", "label": 1}\n{"text": "a"}\n',
        ["line 2: there is no column 'label'", "set data.label "],
    ),
    "null.jsonl": (
        b'\n{"text": "a", "label": 1}\n{"text": null, "label": 1}\n',
        ["line 3: column 'text' holds null, not text"],
    ),
    "number.jsonl": (b'{"text": 5, "label": 1}\n', ["line 1: column 'text' holds 5, not text"]),
    "list.jsonl": (
        b'{"text": "a", "label": [1]}\n',
        ["line 1: column 'label' holds .1., not a label", "data.label"],
    ),
    "surrogate.jsonl": (
        b'{"text": "\\ud83d", "label": 1}\n',
        ["line 1: column 'text' holds half a surrogate pair"],
    ),
    "truth.jsonl": (
        b'{"text": "a", "label": 1}\n{"text": "a", "label": true}\n',
        ["line 2: column 'label' holds true, a truth value, not a label"],
    ),
    "huge.jsonl": (
        b'{"text": "a", "label": 1}\n{"text": "a", "label": 9223372036854775808}\n',
        ["line 2: column 'label' holds 9223372036854775808, a number that 64 bits do not hold"],
    ),
    "endless.jsonl": (
        b'{"text": "a", "label": 0.5}\n{"text": "a", "label": -1e999}\n',
        ["line 2: column 'label' holds -Infinity, a number without end, not a label"],
    ),
    "deep.jsonl": (b'{"text": "a", "label": 1}\n' + b"[" * 99999, ["line 2: it is not JSON"]),
    "two.jsonl": (
        b'{"text": "a", "label": 1}{"text": "a", "label": 1}\n',
        ["line 1: .*Extra data"],
    ),
    "mark.jsonl": (
        b'{"text": "a", "label": 1}\n\xef\xbb\xbf{"text": "a", "label": 1}\n',
        ["line 2: it is not JSON"],
    ),
    "control.jsonl": (
        b'{"text": "a\x01", "label": 1}\n',
        ["line 1: .*Invalid control character at character 12"],
    ),
    "keys.jsonl": (b'{"text": "a", "label": {"is": 1}}\n', ["line 1: column 'label' holds .*is"]),
    "text.txt": (b"a line\n", ["no column 'label', but: text; set data.label"]),
    "fake.parquet": (b"not parquet at all", ["fake.parquet' is not a parquet file: "]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_wrong_with_a_file_is_said(name: str, tmp_path: Path) -> None:
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    for pattern in said:
        with pytest.raises(UserError, match=pattern) as error:
            read(str(tmp_path / name), ["text", "label"], "label")
        assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_name_is_said(tmp_path: Path) -> None:
    for source in (str(tmp_path / "no.jsonl"), "folder/no.jsonl", "package:mlkd_dist/no.jsonl"):
        with pytest.raises(UserError, match="no.jsonl"):
            read(source, ["text"])
    with pytest.raises(UserError, match="no such file"):
        read(str(tmp_path / "no.jsonl"), ["text"])
    with pytest.raises(UserError, match=r"is a folder; give one file that ends in \.jsonl"):
        read(str(tmp_path), ["text"])
    with pytest.raises(UserError, match="only built-in text is 'builtin:python_docs'"):
        read("builtin:docs", ["text"])


def test_columns_of_parquet_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = {"text": ["a", "b", None], "pair": [1, 2, 3], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    with pytest.raises(UserError, match="row 3: column 'text' holds null, not text.*data.text "):
        read(str(path), ["text", "label"], "label")
    with pytest.raises(UserError, match="column 'pair' holds int64"):
        read(str(path), ["pair"])
    with pytest.raises(UserError, match="no column 'pairs'.*'pair'.*set data.text_pair to"):
        read(str(path), ["text", "pairs"])
    datasets.Dataset.from_dict({"text": []}).to_parquet(path)
    with pytest.raises(UserError, match="is empty"):
        read(str(path), ["text"])


def test_python_docs_are_many_distinct_passages_of_english() -> None:
    started = time.process_time()
    texts = read("builtin:python_docs", ["text"])["text"][:]
    # Some 4 s; the room is for slow machines.
    assert time.process_time() - started < 60
    words = [text.split() for text in texts]
    assert len(texts) > 8000 and len(set(texts)) == len(texts)
    assert all(6 <= len(row) <= 60 for row in words)
    assert 16 < np.mean([len(row) for row in words]) < 30
    common = Counter(word for row in words for word in row)
    # As in any English, one word in twenty is "the".
    assert common["the"] > 0.05 * common.total()
    for code in (">>>", "::=", "====", "----", "+--", "def __init__(", "import os\n"):
        assert not [text for text in texts if code in text]
    # Sentences of the language reference and of a docstring, which run over a line end there.
    for sentence in (
        'The "with" statement is used to wrap the execution of a block with methods defined by',
        "SequenceMatcher is a flexible class for comparing pairs of sequences of any type, so",
    ):
        assert any(sentence in text for text in texts)


def test_prose_is_taken_and_code_is_left() -> None:
    text = (
        "Return the first thing that\nis found in the *whole* long list of ``things``.\n\n"
        ">>> find(things)\n3\n\n"
        "Heading\n=======\n\n    value = find(1)\n\n"
        "name    meaning\nfirst   The first.\n\n"
        "* The item says something about a non-\n  virtual base.\n* And so does this other item."
    )
    assert list(builtin_text._passages(text)) == [
        "Return the first thing that is found in the whole long list of things. "
        "The item says something about a non-virtual base.",
        "And so does this other item.",
    ]


def test_python_docs_are_the_same_in_every_process() -> None:
    code = (
        "from mlkd_dist.inputs.builtin_text import _passages, fingerprint as f\n"
        "print(f(), list(_passages('One two three four five six. Seven.')))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].split()[0] == builtin_text.fingerprint()


# Split


def test_split_partitions_by_content_and_not_by_order() -> None:
    # Every text twice: equal rows must fall on one side.
    rows = [{"text": f"text {i % 300}", "label": 0} for i in range(600)]
    train, held_out = split(datasets.Dataset.from_list(rows), 0.1)
    assert Counter(train["text"]) + Counter(held_out["text"]) == Counter(r["text"] for r in rows)
    assert set(train["text"]).isdisjoint(held_out["text"])
    assert len(held_out) == 60
    backwards = split(datasets.Dataset.from_list(rows[::-1]), 0.1)
    assert [sorted(d["text"]) for d in backwards] == [
        sorted(train["text"]),
        sorted(held_out["text"]),
    ]
    # The label is content too.
    other = split(datasets.Dataset.from_list([row | {"label": 1} for row in rows]), 0.1)[1]
    assert set(other["text"]) != set(held_out["text"])


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
def test_split_leaves_no_side_empty(fraction: float) -> None:
    for distinct in (2, 3, 7):
        rows = [{"text": f"t{i % distinct}"} for i in range(4 * distinct)]
        assert all(len(part) for part in split(datasets.Dataset.from_list(rows), fraction))


def test_split_that_cannot_be_is_refused() -> None:
    same = datasets.Dataset.from_list([{"text": "t"}] * 5)
    with pytest.raises(UserError, match="1 distinct row.*data.validation"):
        split(same, 0.5)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="data.validation_fraction is .* between 0 and 1"):
            split(same, fraction)


# Prepare and its cache


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_prepare_tokenises_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    task, tokenizer = FakeTask(), make_tokenizer()
    train, held_out = prepare(source, None, 0.25, task, tokenizer, 8, str(cache))
    assert task.encoded_rows == len(ROWS) and len(held_out) == 5
    # "word<i>" is token i + 2.
    seen = sorted((*row["input_ids"], row["labels"]) for part in (train, held_out) for row in part)
    assert seen == [(i + 2, i + 3, i % 3) for i in range(20)]
    assert len(entries(cache)) == 2

    # Neither read nor tokenised again, by the tokenizer that was used, a fresh one, or from a copy.
    monkeypatch.setattr(data, "read", lambda *_: pytest.fail("read again"))
    copy = write_jsonl(tmp_path / "copy.jsonl", ROWS)
    for given, again in ((source, tokenizer), (source, make_tokenizer()), (copy, tokenizer)):
        later = prepare(given, None, 0.25, task, again, 8, str(cache))
        assert [part.to_list() for part in later] == [train.to_list(), held_out.to_list()]
    assert task.encoded_rows == len(ROWS) and len(entries(cache)) == 2


def test_prepare_with_a_validation_file(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    validation = write_jsonl(tmp_path / "validation.jsonl", ROWS[:4])
    found = prepare(train, validation, 0.05, FakeTask(), make_tokenizer(), 8, str(tmp_path / "c"))
    assert [part["labels"][:] for part in found] == [[i % 3 for i in range(20)], [0, 1, 2, 0]]
    (tmp_path / "link.jsonl").symlink_to(train)
    for same in (train, str(tmp_path / "link.jsonl")):
        with pytest.raises(UserError, match="leave data.validation empty to hold out"):
            prepare(train, same, 0.05, FakeTask(), make_tokenizer(), 8, str(tmp_path / "c"))


def test_whatever_changes_the_tokens_makes_a_new_entry(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    changed = write_jsonl(tmp_path / "changed.jsonl", [*ROWS[:-1], ROWS[-1] | {"text": "word0"}])
    lower = make_tokenizer()
    lower.truncation_side = "left"
    typed = make_tokenizer()
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    calls = [
        (source, 0.25, FakeTask(), make_tokenizer(), 8),
        (changed, 0.25, FakeTask(), make_tokenizer(), 8),
        (source, 0.5, FakeTask(), make_tokenizer(), 8),
        (source, 0.25, FakeTask(pooling="cls"), make_tokenizer(), 8),
        (source, 0.25, FakeTask(), make_tokenizer(words=10), 8),
        (source, 0.25, FakeTask(), lower, 8),
        (source, 0.25, FakeTask(), typed, 8),
        (source, 0.25, FakeTask(), make_tokenizer(), 1),
    ]
    for number, (given, fraction, task, tokenizer, max_length) in enumerate(calls, start=1):
        found = prepare(given, None, fraction, task, tokenizer, max_length, str(cache))
        assert task.encoded_rows == 20
        assert len(entries(cache)) == 2 * number
        longest = max(len(row["input_ids"]) for part in found for row in part)
        assert longest == min(2, max_length)


def test_a_damaged_entry_is_made_again_and_a_half_written_one_is_not_used(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"

    def rows() -> tuple[int, list[Any]]:
        task = FakeTask()
        found = prepare(source, None, 0.25, task, make_tokenizer(), 8, str(cache))
        return task.encoded_rows, [part.to_list() for part in found]

    made, wanted = rows()
    names = entries(cache)
    for name in names:
        arrow = next((cache / name).glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:200])
    assert rows() == (made, wanted)
    for name in names:
        (cache / name / "state.json").unlink()
    assert rows() == (made, wanted)
    assert entries(cache) == names
    assert rows() == (0, wanted)


def test_a_writer_that_is_killed_leaves_no_entry(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"

    class Killed(FakeTask):
        def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]:
            os._exit(9)

    child = os.fork()
    if child == 0:
        prepare(source, None, 0.25, Killed(), make_tokenizer(), 8, str(cache))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert all(name.startswith(".") for name in entries(cache))
    task = FakeTask()
    prepare(source, None, 0.25, task, make_tokenizer(), 8, str(cache))
    assert task.encoded_rows == 20


def test_of_two_writers_the_second_uses_what_the_first_wrote(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"

    class Overtaken(FakeTask):
        def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]:
            prepare(source, None, 0.25, FakeTask(), make_tokenizer(), 8, str(cache))
            return super().encode(rows, tokenizer, max_length)

    train, _ = prepare(source, None, 0.25, Overtaken(), make_tokenizer(), 8, str(cache))
    assert len(train) == 15 and len(entries(cache)) == 2


def test_a_failing_task_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(FakeTask):
        def encode(self, rows: dict[str, list], tokenizer: Any, max_length: int) -> dict[str, list]:
            raise UserError("this text cannot be had")

    source, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    with pytest.raises(UserError, match="this text cannot be had"):
        prepare(source, None, 0.25, Failing(), make_tokenizer(), 8, str(cache))
    assert entries(cache) == set()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def prepared(cache_dir: str | None) -> None:
        prepare(source, None, 0.25, FakeTask(), make_tokenizer(), 8, cache_dir)

    for name in ("MLKD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (
        ("HOME", ".cache/mlkd_dist"),
        ("XDG_CACHE_HOME", "mlkd_dist"),
        ("MLKD_CACHE", ""),
    ):
        monkeypatch.setenv(name, str(tmp_path / name))
        prepared(None)
        assert len(entries(tmp_path / name / folder)) == 2
    prepared(str(tmp_path / "given"))
    assert len(entries(tmp_path / "given")) == 2
    # A file stands where the folder should be: refused even for root.
    with pytest.raises(UserError, match="rows.jsonl/cache.*data.cache or .MLKD_CACHE"):
        prepared(source + "/cache")


# Sampler

LAYOUTS = [
    (rows, micro_batch, grad_accum, world)
    for rows in (1, 2, 7, 24, 25, 100)
    for micro_batch in (1, 3, 4)
    for grad_accum in (1, 2, 5)
    for world in (1, 2, 3)
]


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_row_is_lost_or_repeated_in_an_epoch(shuffle: bool) -> None:
    for rows, micro_batch, grad_accum, world in LAYOUTS:
        ranks = [Sampler(rows, micro_batch, grad_accum, r, world, 5, shuffle) for r in range(world)]
        per_epoch = ranks[0].steps_per_epoch
        assert per_epoch == -(-rows // (micro_batch * grad_accum * world))
        for epoch in (0, 3):
            steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            seen = [sampler.step(step) for step in steps for sampler in ranks]
            assert {len(step) for step in seen} == {grad_accum}
            assert {len(micro) for step in seen for micro in step} == {micro_batch}
            given = sorted(row for step in seen for micro in step for row in micro if row != -1)
            assert given == list(range(rows))


def test_a_step_holds_the_same_rows_in_every_layout() -> None:
    def global_batch(step: int, micro_batch: int, grad_accum: int, world: int) -> list[int]:
        ranks = [Sampler(50, micro_batch, grad_accum, r, world, 7) for r in range(world)]
        return sorted(row for s in ranks for micro in s.step(step) for row in micro)

    layouts = [(12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (4, 1, 3), (2, 2, 3), (1, 12, 1)]
    # 50 rows are 5 steps of 12, the last one short by 10; step 7 lies in the second epoch.
    for step in (0, 4, 7):
        wanted = global_batch(step, *layouts[0])
        assert wanted.count(-1) == (10 if step == 4 else 0)
        assert all(global_batch(step, *layout) == wanted for layout in layouts)


def test_a_step_depends_on_seed_and_step_alone() -> None:
    walked = Sampler(30, 4, 2, 1, 2, seed=1)
    order = [walked.step(step) for step in range(12)]
    for step in (11, 0, 5):
        assert Sampler(30, 4, 2, 1, 2, seed=1).step(step) == order[step]
        assert walked.step(step) == order[step]
    other = Sampler(30, 4, 2, 1, 2, seed=2)
    assert other.step(0) != order[0]
    # Another epoch, another order.
    assert walked.steps_per_epoch == 2 and order[0] != order[2]


def test_the_global_batch_is_a_run_of_the_permutation() -> None:
    permutation = np.random.default_rng([9, 1]).permutation(10)
    one = Sampler(10, 2, 2, 0, 1, seed=9)
    assert np.concatenate(one.step(4)).tolist() == permutation[4:8].tolist()
    # What is left over fills the slots in order; a rank may get none.
    left = permutation[8:10].tolist()
    assert one.step(5) == [left, [-1, -1]]
    assert [Sampler(10, 2, 1, rank, 2, seed=9).step(5) for rank in range(2)] == [[left], [[-1, -1]]]
    assert Sampler(5, 2, 1, 0, 1, seed=0, shuffle=False).step(2) == [[4, -1]]
    # Every rank's first micro-batch is filled before anyone's second, so that no rank idles alone.
    short = [Sampler(4, 2, 2, rank, 2, seed=0, shuffle=False).step(0) for rank in range(2)]
    assert short == [[[0, 1], [-1, -1]], [[2, 3], [-1, -1]]]


# Batches


def tell(rows: list[dict[str, Any]], keep: list[bool]) -> list[tuple[Any, ...]]:
    return [
        (row["text"], row["row"], row["epoch"], kept) for row, kept in zip(rows, keep, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_rows_that_the_sampler_names(workers: int) -> None:
    dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(10)]})
    sampler = Sampler(10, 3, 2, 1, 2, seed=3)
    # One step is 12 rows, so each epoch is one step with two empty slots, both of rank 1.
    found = list(batches(dataset, sampler, 2, 5, tell, workers=workers))
    wanted = [
        [
            [(f"t{max(r, 0)}", max(r, 0), step, r >= 0) for r in micro]
            for micro in sampler.step(step)
        ]
        for step in (2, 3, 4)
    ]
    assert found == wanted
    assert [kept for step in found for micro in step for *_, kept in micro].count(False) == 6
    assert list(batches(dataset, sampler, 5, 5, tell, workers=workers)) == []


def test_workers_collate_however_python_starts_processes() -> None:
    """With what a run collates with, which is a function inside a function."""
    dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(4)]})
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = list(batches(dataset, Sampler(4, 2, 1, 0, 1, 0), 0, 2, lambda r, k: len(r), 1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert found == [[2], [2]]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
def test_a_worker_ends_with_the_process_that_it_loads_for() -> None:
    """Of its connections it holds copies: others would wait for who is dead."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
        # The worker inherits the pipe, and with it the right to keep it open.
        found = batches(dataset, Sampler(2, 1, 1, 0, 1, seed=0), 0, 2, tell, workers=1)
        next(found)
        os.write(write, b"1")
        time.sleep(60)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.kill(child, signal.SIGKILL)
    begun = time.monotonic()
    # By itself it looks for its parent every 5 s.
    assert os.read(read, 1) == b"" and time.monotonic() - begun < 4
    os.waitpid(child, 0)
    os.close(read)


def test_batches_leave_the_global_random_state_alone() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
    before = torch.get_rng_state()
    list(batches(dataset, Sampler(2, 1, 1, 0, 1, seed=0), 0, 2, tell))
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_rows_are_the_same_ones_whatever_their_order(tmp_path: Path) -> None:
    """Nested, and none of them held out."""

    def texts(rows: list[dict], count: int | None, name: str) -> tuple[list, list]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        parts = prepare(source, None, 0.25, FakeTask(), make_tokenizer(), 8, str(cache), count)
        return tuple([tuple(row["input_ids"]) for row in part] for part in parts)

    cache = tmp_path / "cache"
    (few, held_out), (more, same), (every, _) = (texts(ROWS, n, "a") for n in (4, 9, None))
    assert (len(few), len(more), len(every)) == (4, 9, 15) and held_out == same
    assert set(few) < set(more) < set(every)
    # In the order of the data, and chosen by what the rows are, not by where they stand.
    assert few == [row for row in every if row in few] != every[:4]
    assert set(texts(ROWS[::-1], 4, "b")[0]) == set(few)
    with pytest.raises(UserError, match="data.train_rows: 16 is more than the 15 rows"):
        texts(ROWS, 16, "a")
