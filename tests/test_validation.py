"""The student on the held-out rows while it trains, and the best one of a run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS, logged, run_config, start
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlkd_dist.checkpoint import Checkpoints, Position
from mlkd_dist.config import RunConfig, UserError, from_mapping
from mlkd_dist.preflight import check_held_out
from mlkd_dist.processes.world import World
from mlkd_dist.saving import commit
from mlkd_dist.tasks import Decides
from mlkd_dist.watching.validation import Validation

DECIDES = {
    "classification": "accuracy",
    "regression": "spearman",
    "question_answering": "f1",
    "masked_lm": "perplexity",
    "causal_lm": "perplexity",
    "embedding": "spearman",
}
# Of the runs that are always tested.
DEFAULT = ("classification", "causal_lm")
LOSSES = {"hidden_mse": {}, "soft_labels": {}, "hard_labels": {}}
STAGES = [
    {"name": "one", "steps": 3, "losses": {"hidden_mse": {}}},
    {"name": "two", "steps": 7, "losses": LOSSES},
]


class Place:
    def __init__(self, base: Path, teachers: dict[str, Path], data: dict[str, str]):
        self.base, self.teachers, self.data = base, teachers, data

    def write(self, name: str, task: str = "classification", zero: int = 2, **run: Any) -> str:
        (self.base / name).mkdir()
        config = run_config(
            self.base / name, self.teachers[task], self.data, task, student__zero_stage=zero
        )
        config["student"]["dropout"] = True
        config["run"] |= {"checkpoint_every": 2, "checkpoint_minutes": None} | run
        config["data"]["cache"] = str(self.base / "cache")
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        config["stages"] = STAGES
        if task != "classification":
            losses = {"hidden_mse": {}} if task == "embedding" else LOSSES
            config["stages"] = [{"name": "two", "steps": 4, "losses": losses}]
        if task == "regression":
            config["data"]["label"] = "score"
        if task == "question_answering":
            config["data"] |= questions(self.base / "questions.jsonl")
        path = self.base / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def run(self, name: str) -> Path:
        return self.base / name / "run"

    def said(self, name: str) -> list[str]:
        return json.loads((self.base / f"{name}.said").read_text())

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.run(name) / "report.json").read_text())

    def evaluated(self, name: str, stage: str = "two") -> dict[int, dict[str, float]]:
        """Steps that are done -> what was measured."""
        return {
            row["step"] + 1: {k: v for k, v in row.items() if k.startswith("validation/")}
            for row in logged({"run": {"dir": self.run(name)}})
            if "validation/loss" in row or "validation/spearman" in row
            if row["stage"] == stage
        }


def questions(path: Path) -> dict[str, Any]:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(20):
            words = draw.sample(WORDS, 10)
            answers = {"text": [words[3]], "answer_start": [len(" ".join(words[:3])) + 1]}
            row = {"question": words[2], "passage": " ".join(words), "answers": answers}
            file.write(json.dumps(row) + "\n")
    named = {"text": "question", "text_pair": "passage", "label": "answers", "max_length": 24}
    return {"train": str(path), "validation": None, "validation_fraction": 0.3} | named


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict
) -> Callable[[list[int], list[str], str], Place]:
    """Of each ZeRO stage a run that is not evaluated, one that is, and one that is killed too; of
    each task one; in two processes."""

    def runs(zero: list[int], tasks: list[str], name: str) -> Place:
        place, words = Place(tmp_path_factory.mktemp(name), teachers, data), []
        for stage in zero:
            words.append(place.write(f"plain{stage}", zero=stage))
            asked = {"evaluate_every": 3, "export": "best"}
            path = place.write(f"best{stage}", zero=stage, **asked)
            # Steps 8 and 9 are made twice, and step 9 is evaluated twice.
            words += [f"{path}@9", path]
        if 2 in zero:
            words.append(place.write("whole", **asked))
            words.append(place.write("last", evaluate_every=3))
        for i, task in enumerate(tasks):
            words.append(place.write(task, task, zero=3 - i % 4, evaluate_every=2, export="best"))
        start("interrupted_runs.py", words, place.base, world=2)
        return place

    return runs


@pytest.fixture(scope="module")
def place(make: Callable) -> Place:
    return make([3], ["causal_lm"], "runs")


@pytest.fixture(scope="module")
def others(make: Callable) -> Place:
    return make([0, 1, 2], [task for task in DECIDES if task not in DEFAULT], "others")


def test_evaluation_leaves_every_bit_of_training_alone(place: Place) -> None:
    unchanged(place, 3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_evaluation_leaves_training_alone_at_other_stages(others: Place, zero: int) -> None:
    unchanged(others, zero)


def unchanged(place: Place, zero: int) -> None:
    assert place.said(f"best{zero}") == ["done", ""], place.said(f"best{zero}")
    end = "checkpoints/step-000010/export"
    assert same(place.run(f"best{zero}") / end, place.run(f"plain{zero}") / "export")
    rows = [
        [
            {k: v for k, v in row.items() if k.startswith(("loss/", "grad_norm", "step", "lr"))}
            for row in logged({"run": {"dir": place.run(name)}})
            if "loss/total" in row
        ]
        for name in (f"best{zero}", f"plain{zero}")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 10


def test_the_best_student_is_exported(place: Place) -> None:
    exported_best(place, "best3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best0", "best1", "best2"])
def test_the_best_student_is_exported_at_other_stages(others: Place, name: str) -> None:
    exported_best(others, name)


def exported_best(place: Place, name: str) -> None:
    found = place.evaluated(name)
    # Counted from the start of the stage, which has three steps before it; and after its last one.
    assert list(found) == [6, 9, 10] and list(place.evaluated(name, "one")) == [3]
    values = {step: row["validation/accuracy"] for step, row in found.items()}
    step = max(values, key=lambda step: (values[step], -step))
    best = {"step": step, "measure": "accuracy", "value": values[step]}
    report = place.report(name)
    assert report["best"] == best
    assert report["student"]["quality"]["accuracy"] == pytest.approx(values[step])
    root = place.run(name) / "checkpoints"
    assert [path.name for path in root.glob("best-*")] == [f"best-{step:06d}"]
    assert same(root / f"best-{step:06d}" / "export", place.run(name) / "export")
    # Measured by transformers alone, without any of our code.
    tokenizer = AutoTokenizer.from_pretrained(place.run(name) / "export")
    model = AutoModelForSequenceClassification.from_pretrained(place.run(name) / "export").eval()
    lines = [json.loads(line) for line in Path(place.data["validation"]).read_text().splitlines()]
    with torch.no_grad():
        logits = torch.cat(
            [model(**tokenizer(row["text"], return_tensors="pt")).logits for row in lines]
        )
    truth = torch.tensor([row["label"] for row in lines])
    assert (logits.argmax(1) == truth).float().mean().item() == pytest.approx(values[step])
    loss = torch.nn.functional.cross_entropy(logits, truth).item()
    assert found[step]["validation/loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_killed_has_the_same_best_and_the_same_export(others: Place) -> None:
    assert others.evaluated("best2") == others.evaluated("whole")
    assert others.report("best2")["best"] == others.report("whole")["best"]
    assert same(others.run("best2") / "export", others.run("whole") / "export")


def test_each_point_is_on_the_board_once(place: Place) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place.run("best3") / "tb"))
    events.Reload()
    steps = [event.step for event in events.Scalars("validation/accuracy")]
    assert steps == [2, 5, 8, 9]


@pytest.mark.slow
def test_the_last_student_is_exported_where_nothing_else_is_said(others: Place) -> None:
    assert same(others.run("last") / "export", others.run("plain2") / "export")
    assert others.report("last")["best"] == others.report("whole")["best"]


def test_a_decoder_has_a_measure_that_decides(place: Place) -> None:
    decided(place, "causal_lm")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embedding", "masked_lm", "regression", "question_answering"])
def test_other_tasks_have_one_too(others: Place, task: str) -> None:
    decided(others, task)


def decided(place: Place, task: str) -> None:
    assert place.said(task) == ["done", ""], place.said(task)
    measure, report = DECIDES[task], place.report(task)
    found = {step: row[f"validation/{measure}"] for step, row in place.evaluated(task).items()}
    assert list(found) == [2, 4]
    choose = min if measure == "perplexity" else max
    value = choose(found.values())
    assert report["best"] == {
        "step": next(step for step in found if found[step] == value),
        "measure": measure,
        "value": value,
    }
    # As the report has it, which reads the exported folder.
    kind = "agreement" if task == "embedding" else "quality"
    assert report["student"][kind][measure] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    "higher, value, best, expected",
    [
        (True, 0.5, None, True),
        (True, 0.5, 0.5, False),
        (True, 0.6, 0.5, True),
        (True, 0.4, 0.5, False),
        (False, 7.0, 8.0, True),
        (False, 8.0, 7.0, False),
        (True, None, None, False),
        (True, float("nan"), None, False),
        (False, float("inf"), None, False),
    ],
)
def test_what_is_better(higher: bool, value: Any, best: Any, expected: bool) -> None:
    validation = object.__new__(Validation)
    validation.decides = Decides("x", higher)
    before = None if best is None else {"measure": "x", "value": best}
    assert validation.better(value, before) == expected
    # What another measure said is not compared with.
    assert validation.better(0.0, {"measure": "y", "value": 1.0})


@pytest.mark.parametrize(
    "kind, rows, lacking",
    [
        ("classification", {"labels": [-1, -1]}, "none of the held-out rows has a known label"),
        ("regression", {"labels": [2.5, 2.5]}, "the held-out rows have not two different labels"),
        ("embedding", {"input_ids": [[1], [2]]}, "there are 2 held-out texts"),
    ],
)
def test_rows_that_decide_nothing_are_refused(kind: str, rows: dict, lacking: str) -> None:
    def run(rows: dict) -> SimpleNamespace:
        config = from_mapping(
            {
                "task": {"kind": kind},
                "data": {"train": "x"},
                "run": {"evaluate_every": 5},
                "teacher": {"path": "a/b"},
                "student": {"path": "a/b"},
                "stages": [{"steps": 1, "losses": {"hidden_mse": {}}}],
            }
        )
        return SimpleNamespace(config=config, held_out=Dataset.from_dict(rows))

    with pytest.raises(UserError, match=f"run.evaluate_every: 5 is given, but {lacking}"):
        check_held_out(run(rows))
    ((name, values),) = rows.items()
    check_held_out(run({name: [*values, values[0] if kind == "embedding" else 1]}))


def test_a_best_student_goes_when_no_checkpoint_knows_it(tmp_path: Path, one_process: None) -> None:
    checkpoints = Checkpoints(tmp_path, World(0, 1, 0, torch.device("cpu")), keep=1)
    (tmp_path / "bytes").write_bytes(b"weights")

    def write(folder: Path) -> list[str]:
        shutil.copy(tmp_path / "bytes", folder / "weights")
        return ["weights"]

    def best(step: int) -> None:
        name = commit.best_name(step)
        checkpoints.seal(name, write, {"start": None})
        checkpoints.best = {"name": name, "step": step, "measure": "f1", "value": float(step)}
        commit.prune_best(checkpoints.root, name)

    def there() -> list[str]:
        return sorted(path.name for path in checkpoints.root.glob("best-*"))

    best(10)
    assert there() == ["best-000010"] and commit.latest(checkpoints.root) is None
    checkpoints.commit(Position(0, 10), write, {"stage_done": False})
    best(20)
    # After a kill a run goes on from step 10, with the best of then.
    assert there() == ["best-000010", "best-000020"]
    best(30)
    assert there() == ["best-000010", "best-000030"]
    checkpoints.commit(Position(0, 40), write, {"stage_done": False})
    assert there() == ["best-000030"] and commit.latest(checkpoints.root) == "step-000040"
    (checkpoints.root / "best-000050.partial").mkdir()
    checkpoints.commit(Position(0, 50), write, {"stage_done": False})
    assert there() == ["best-000030"]
    manifest = checkpoints.newest()
    assert manifest["best"] == checkpoints.best == checkpoints.sound(manifest["best"])
    # One that is damaged is not taken for the best any more.
    (checkpoints.root / "best-000030" / "weights").write_bytes(b"weightz")
    assert checkpoints.sound(manifest["best"]) is None


def test_a_damaged_best_student_is_not_published(
    tmp_path: Path, one_process: None, capsys: pytest.CaptureFixture
) -> None:
    """As where a run goes on that was killed after its last stage."""
    world = World(0, 1, 0, torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path, world, keep=1, exports="best")

    def write(content: bytes) -> Callable[[Path], list[str]]:
        def files(folder: Path) -> list[str]:
            (folder / "export").mkdir()
            (folder / "export" / "weights").write_bytes(content)
            return ["export/weights"]

        return files

    def published(name: str) -> bytes:
        checkpoints.publish(name)
        return (tmp_path / "export" / "weights").read_bytes()

    first = checkpoints.commit(Position(0, 5), write(b"first"), {"stage_done": True})
    assert published(first) == b"first"
    checkpoints.seal("best-000007", write(b"best"), {"start": None})
    checkpoints.best = {"name": "best-000007", "step": 7, "measure": "f1", "value": 0.5}
    last = checkpoints.commit(Position(1, 5, 5, first), write(b"last"), {"stage_done": True})
    assert published(last) == b"best" and not capsys.readouterr().err
    checkpoints.exports = "last"
    assert published(last) == b"last"
    checkpoints.exports = "best"
    (checkpoints.root / "best-000007" / "export" / "weights").write_bytes(b"bust")
    assert published(last) == b"last"
    assert "best-000007, the best student so far, is not used" in capsys.readouterr().err


def test_the_defaults_change_nothing() -> None:
    assert RunConfig().evaluate_every is None and RunConfig().export == "last"
