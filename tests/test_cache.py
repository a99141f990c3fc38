"""What a teacher said, written by `mlkd cache` and read in its place."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stored_config, world_of_one

from mlkd_dist.cache import plan as cache_plan
from mlkd_dist.cache import write as writing
from mlkd_dist.cache.plan import Ranges
from mlkd_dist.cache.stored import (
    Stored,
    StoredTeacher,
    read_state,
    row_keys,
    shard_names,
    state_needs,
)
from mlkd_dist.config import UserError, from_mapping
from mlkd_dist.inputs.batches import batches
from mlkd_dist.models.head import top_k_rows
from mlkd_dist.models.model import read_config
from mlkd_dist.preflight import prepared
from mlkd_dist.processes.world import World
from mlkd_dist.run import Run, source
from mlkd_dist.saving import commit
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs

VOCABULARY = 64


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def run_of(tmp_path: Path, teachers: dict, data: dict, world: World) -> Callable[..., Run]:
    """A run of a task, up to where its cache is looked at."""

    def made(task: str, top_k: int | None = None, **changes: Any) -> Run:
        given = stored_config(tmp_path, teachers[task], data, task, top_k, **changes)
        found = from_mapping(given)
        return prepared(found, world, source(found))

    return made


def folder_of(run: Run) -> Path:
    return Path(run.config.teacher.cache.dir)


def live_teacher(run: Run) -> Teacher:
    settings, needs = run.config.teacher, Needs(run.task.reads)
    return Teacher(settings.path, settings, run.task.model_class, needs, run.world)


def some_batches(run: Run, size: int, epochs: int = 1) -> Iterator[Any]:
    """Backwards, with slots that are not filled."""
    rows = len(run.train)
    for epoch in range(epochs):
        order = Ranges([[(first, first + 1, epoch) for first in reversed(range(rows))]], 1)
        keep: list[Any] = []
        for (batch,) in batches(run.train, order, 0, order.steps, lambda rows, keep: rows[0]):
            keep.append(batch)
            if len(keep) == size:
                yield run.task.collate(keep, [True] * (size - 1) + [False], run.tokenizer)
                keep = []


@pytest.mark.parametrize("task", ["classification", "regression", "question_answering"])
def test_all_logits_are_those_of_the_teacher(run_of: Callable, task: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if task == "regression":
        changes = {"data__label": "score"}
    if task == "question_answering":
        rows = [
            {"question": "w1", "passage": "w2 w3 w1 w4 " * (1 + i % 3), "answers": None, "id": i}
            for i in range(9)
        ]
        for row in rows:
            row["answers"] = {"text": ["w4"], "answer_start": [row["passage"].index("w4")]}
            row["question"] += f" w{5 + row['id']}"
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(tmp_path / "q.jsonl"), "text": "question", "text_pair": "passage"}
        data |= {"label": "answers", "validation": None, "validation_fraction": 0.3}
        changes = {f"data__{key}": value for key, value in data.items()}
    run = run_of(task, **changes)
    writing.write_cache(run)
    cache_plan.check_cache(run)
    live, stored = live_teacher(run), StoredTeacher(str(folder_of(run)), [])
    for batch in some_batches(run, 3):
        found, expected = (teacher(stored.attach(batch)) for teacher in (stored, live))
        assert found.logits.shape == expected.logits.shape
        torch.testing.assert_close(found.logits[:2], expected.logits[:2], rtol=0, atol=2e-6)
        assert not found.logits[2].isnan().any() and found.logits[2].isfinite().any()


@pytest.mark.parametrize(
    ("task", "top_k", "pack"),
    [("causal_lm", 5, False), ("causal_lm", VOCABULARY, True), ("masked_lm", 5, False)],
)
def test_the_largest_logits_are_those_of_the_teacher(
    run_of: Callable, task: str, top_k: int, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token that counts; of masked_lm in each of the epochs, which hide other tokens."""
    monkeypatch.setattr(writing, "SHARD_ROWS", 4)
    run = run_of(task, top_k, data__pack=pack, batch__micro_batch=16)
    writing.write_cache(run)
    cache_plan.check_cache(run)
    live, stored = live_teacher(run), StoredTeacher(str(folder_of(run)), [])
    assert len(stored.stored.shards) > 1
    # Three steps of 16 of 17 rows.
    epochs = 1 if task == "causal_lm" else 2
    assert cache_plan.epochs(run) == epochs
    for batch in some_batches(run, 3, epochs):
        said = stored(stored.attach(batch)).top_k
        trace = live(batch)
        entering = trace.head_input.flatten(0, 1).index_select(0, batch.label_rows)
        with trace.head.opened(entering) as rows:
            logits = rows.logits()
        expected = top_k_rows(logits, top_k, (2.0,))
        assert torch.equal(said.ids.sort(1).values, expected.ids.sort(1).values)
        torch.testing.assert_close(said.gaps, expected.gaps, rtol=2e-3, atol=1e-4)
        if top_k == VOCABULARY:
            assert said.rest is None
        else:
            others = logits.double().scatter(1, said.ids.long(), -torch.inf)
            rest = ((others - logits.amax(1, keepdim=True)) / 2.0).logsumexp(1)
            torch.testing.assert_close(said.rest[:, 0].double(), rest, rtol=1e-5, atol=1e-5)
    # A batch of nothing but filled-up slots, as at the end of an epoch.
    batch.keep[:], batch.label_keep[:] = False, False
    assert len(stored.attach(batch).stored.top_k.gaps) == 0


STATES = {
    "embedding_relation": {},
    "hidden_mse": {"layers": "last"},
    "cls_cosine": {"layers": [[0, 1]], "of": "mean"},
    "sample_relation": {"of": "last"},
}


@pytest.mark.parametrize(("task", "dtype"), [("classification", "fp32"), ("causal_lm", "bf16")])
def test_states_are_those_of_the_teacher(run_of: Callable, task: str, dtype: str) -> None:
    """Bit for bit where the batch is the same: they are kept in the teacher's own type."""

    def with_losses(losses: dict[str, Any]) -> Run:
        run = run_of(task, VOCABULARY if task == "causal_lm" else None, states=losses)
        run.config.teacher.dtype = dtype
        return run

    run = with_losses(STATES)
    states = cache_plan.states(run.config)
    top = read_config(run.config.teacher.path).num_hidden_layers - 1
    assert states == ["embedding", "last", "layer 1 mean", f"layer {top} hidden"]
    writing.write_cache(run)
    cache_plan.check_cache(run)
    stored, settings = StoredTeacher(str(folder_of(run)), states), run.config.teacher
    needs = state_needs(states)
    live = Teacher(settings.path, settings, run.task.model_class, needs, run.world)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bf16" else {"rtol": 1e-5, "atol": 2e-6}
    for batch in some_batches(run, 3):
        found, expected = (teacher(stored.attach(batch)) for teacher in (stored, live))
        real = batch.inputs["attention_mask"].bool()
        for name in states:
            ours, theirs = (read_state(trace, name) for trace in (found, expected))
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            rows = (slice(2),) if ours.ndim == 2 else (real[:2].nonzero(as_tuple=True))
            torch.testing.assert_close(ours[rows], theirs[rows], **close)
            assert not ours[2].any() and (ours.ndim == 2 or not ours[~real].any())
    # Nothing is read that no loss of a stage asks for.
    assert list(StoredTeacher(str(folder_of(run)), ["last"]).attach(batch).stored.states) == [
        "last"
    ]
    # Less of it serves; more is refused.
    cache_plan.check_cache(with_losses({"hidden_mse": {"layers": "last"}}))
    more = with_losses(STATES | {"hidden_mse": {"layers": [[1, 0]]}})
    with pytest.raises(UserError, match="what the losses read: layer 0 hidden is not there"):
        cache_plan.check_cache(more)


def test_a_key_tells_rows_apart_and_not_their_batches(run_of: Callable) -> None:
    run = run_of("causal_lm", 4)
    alone = {key for batch in some_batches(run, 2) for key in row_keys(batch) if key is not None}
    for size in (3, 4):
        wider = {key for batch in some_batches(run, size) for key in row_keys(batch) if key}
        assert wider and len(wider & alone) > len(wider) // 3
    rows = [run.train[0] | {"row": 0, "epoch": 0}, run.train[0] | {"row": 1, "epoch": 3}]
    longer = run.train[max(range(5), key=lambda i: len(run.train[i]["input_ids"]))]
    rows.append(longer | {"row": 2, "epoch": 0})
    same, again, _ = row_keys(run.task.collate(rows, [True] * 3, run.tokenizer))
    run.tokenizer.padding_side = "left"
    left, *_ = row_keys(run.task.collate(rows, [True] * 3, run.tokenizer))
    assert same == again == left
    # The same tokens, of which other ones are learned.
    other = rows[0] | {"target": [False, *rows[0]["target"][1:-1], False]}
    assert row_keys(run.task.collate([other], [True], run.tokenizer)) != [same]


def killed(point: str) -> Callable[[str], None]:
    def reached(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    return reached


@pytest.mark.parametrize("point", ["synced", "shard sealed", "shard there", "cache sealed"])
def test_what_a_kill_left_is_gone_on_with(
    run_of: Callable, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 4)
    run = run_of("classification")
    folder = folder_of(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(commit, "reached", killed(point))
        writing.write_cache(run)
    with pytest.raises(UserError, match="is not finished; run `mlkd cache`"):
        cache_plan.require(run.config)
    before = {name: (folder / name).stat().st_mtime_ns for name in shard_names(folder)}
    assert (
        len(before) == {"synced": 0, "shard sealed": 0, "shard there": 1, "cache sealed": 5}[point]
    )
    # What a kill leaves of a file that was being written.
    (folder / "shard-00003.partial").write_bytes(b"torn")
    writing.write_cache(run)
    cache_plan.check_cache(run)
    after = {name: (folder / name).stat().st_mtime_ns for name in shard_names(folder)}
    assert len(after) == 5 and before.items() <= after.items()


def damage(name: str) -> Callable[[Path], None]:
    def shard(folder: Path) -> Path:
        return folder / shard_names(folder)[1]

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return {
        "truncated": lambda folder: os.truncate(shard(folder), shard(folder).stat().st_size - 7),
        "flipped bit": lambda folder: flipped(shard(folder)),
        "missing shard": lambda folder: shard(folder).unlink(),
        "index": lambda folder: flipped(folder / "index.safetensors"),
        "manifest": lambda folder: flipped(folder / "manifest.json"),
    }[name]


DAMAGE = {
    "truncated": "shard-00001.*bytes instead of.*run `mlkd cache`",
    "flipped bit": "shard-00001.*is damaged.*makes anew",
    "missing shard": "shard-00001.*is missing",
    "index": "index.safetensors is damaged",
    "manifest": "manifest.json is damaged",
}


def test_damage_is_refused_and_made_anew(
    run_of: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 4)
    run = run_of("classification")
    folder = folder_of(run)
    writing.write_cache(run)
    sound = {path.name for path in folder.iterdir()}
    for name, message in DAMAGE.items():
        damage(name)(folder)
        with pytest.raises(UserError, match=message) as refused:
            cache_plan.check_cache(run)
        assert str(refused.value).startswith("teacher.cache.dir: ")
        writing.write_cache(run)
        cache_plan.check_cache(run)
        assert {path.name for path in folder.iterdir()} == sound
    # A whole one is left as it is.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    writing.write_cache(run)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "was there already" in capfd.readouterr().err


def test_what_it_was_not_made_for_is_refused(
    run_of: Callable, tmp_path: Path, data: dict, teachers: dict
) -> None:
    run = run_of("causal_lm", 5)
    folder = folder_of(run)
    writing.write_cache(run)
    other = tmp_path / "other teacher"
    shutil.copytree(teachers["causal_lm"], other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    changed = {
        "teacher.cache.top_k: 5 -> 6": {"top_k": 6},
        "data.max_length: 48 -> 40": {"data__max_length": 40},
        "data.pack: False -> True": {"data__pack": True},
        "teacher.dtype: fp32 -> bf16": {"teacher__dtype": "bf16"},
        "what teacher.path holds": {"teacher__path": str(other)},
        r"what data.train holds: \d of 7 rows are not there": {
            "data__train": data["validation"],
            "data__validation": data["train"],
        },
    }
    for message, change in changed.items():
        top_k = change.pop("top_k", 5)
        # run_of makes the teacher's block anew, and its cache with it.
        own = {k: v for k, v in change.items() if not k.startswith("teacher__")}
        another = run_of("causal_lm", top_k, **own)
        for key, value in change.items():
            if key.startswith("teacher__"):
                setattr(another.config.teacher, key.removeprefix("teacher__"), value)
        assert folder_of(another) == folder
        with pytest.raises(UserError, match=message) as refused:
            cache_plan.check_cache(another)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match="holds a cache that was made for something else"):
            writing.write_cache(another)
    # A part of its rows is there, whatever the file is called.
    part = run_of("causal_lm", 5, data__train_rows=5)
    cache_plan.check_cache(part)
    warmer = run_of("causal_lm", 5)
    warmer.config.stages[0].losses["soft_labels"]["temperature"] = 4.0
    with pytest.raises(UserError, match=r"soft_labels.temperature: \[2.0\] -> \[4.0\]"):
        cache_plan.check_cache(warmer)


def test_files_of_others_are_left_alone(run_of: Callable) -> None:
    run = run_of("classification")
    folder_of(run).mkdir()
    (folder_of(run) / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="holds files that are no cache; choose another"):
        writing.write_cache(run)
    with pytest.raises(UserError, match="holds nothing of a teacher; run `mlkd cache`.*cache=null"):
        cache_plan.require(run.config)
    assert [path.name for path in folder_of(run).iterdir()] == ["thesis.tex"]


def test_nothing_of_a_shard_is_loaded_before_it_is_read(
    run_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 4)
    run = run_of("classification")
    writing.write_cache(run)
    stored = Stored(folder_of(run), [])
    (batch,) = [b for i, b in enumerate(some_batches(run, 2)) if i == 0]
    stored.attach(batch)
    assert stored.shard.cache_info().misses == 1
    mapped = Path("/proc/self/maps").read_text()
    assert stored.shards[-1] in mapped and stored.shards[0] not in mapped
