"""`mlkd bench`: the step beside its floor, by the run's own step, without a trace in its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import yaml
from conftest import run_config, start, world_of_one

from mlkd_dist import bench, objective
from mlkd_dist import config as configs
from mlkd_dist.bench import peak_of, table, whole
from mlkd_dist.inputs.quarantine import Quarantine
from mlkd_dist.processes.world import World
from mlkd_dist.tasks import BadRow, Batch
from mlkd_dist.trace import Needs, Trace


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict
) -> dict[str, dict]:
    base: Path = tmp_path_factory.mktemp("bench")
    few = {"hidden_mse": {}, "attention_relation": {}}
    embedding = run_config(base, teachers["embedding"], data, task="embedding")
    labelled = run_config(base, teachers["classification"], data, student__zero_stage=3)
    embedding["stages"][0]["losses"] = few
    labelled["teacher"]["zero_stage"] = 3
    labelled["stages"][0]["losses"] = few | {"sample_relation": {}, "soft_labels": {}}
    labelled["batch"]["grad_accum"] = 2
    # One stage that opens layer after layer; and a teacher whose head is still to be trained.
    one = {"cls_cosine": {}, "soft_labels": {}}
    labelled["stages"].append({"name": "sid", "steps": 20, "losses": one, "open": {"rule": "sid"}})
    headless = run_config(base, teachers["embedding"], data)
    headless["teacher"]["finetune"] = {"steps": 1}
    headless["stages"] = [{"name": "labels", "steps": 5, "losses": {"hard_labels": {}}}]
    # Over a vocabulary, whose logits no loss makes whole.
    masked = run_config(base, teachers["masked_lm"], data, task="masked_lm")
    masked["stages"][0]["losses"] = {"soft_labels": {}, "hidden_mse": {}}
    configs = {"embedding": embedding, "labelled": labelled, "headless": headless}
    configs["masked"] = masked
    for name, config in configs.items():
        config["run"]["dir"] = str(base / name)
        config["bench"] = {"rounds": 1, "steps": 1}
    # An earlier run that is not to be touched.
    (base / "embedding").mkdir()
    (base / "embedding" / "mine.txt").write_text("mine")
    paths = [base / "logs" / f"{name}.yaml" for name in configs]
    (base / "logs").mkdir()
    for path, config in zip(paths, configs.values(), strict=True):
        path.write_text(yaml.safe_dump(config))
    start("bench_runs.py", [*map(str, paths)], base / "logs", world=2)
    left = {path.name for path in base.iterdir()}
    jsons = {f"{name}-bench.json" for name in configs}
    assert left == {"embedding", "logs", "cache"} | jsons
    assert [path.name for path in (base / "embedding").iterdir()] == ["mine.txt"]
    return {name: json.loads((base / f"{name}-bench.json").read_text()) for name in configs} | {
        "configs": configs
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding", "labelled", "headless", "masked"])
def test_what_is_told(measured: dict, name: str) -> None:
    found, config = measured[name], measured["configs"][name]
    assert found["processes"] == 2
    for stage, asked in zip(found["stages"], config["stages"], strict=True):
        assert stage["losses"].keys() == asked["losses"].keys()
        assert stage["overhead"] == stage["step_s"] / stage["floor_s"]
        assert min(stage["floor_s"], stage["step_s"]) > 0
        assert min(stage["floor_peak_gib"], stage["step_peak_gib"]) > 0.05
        for loss, cost in stage["losses"].items():
            assert cost["share"] == cost["seconds"] / stage["step_s"]
            # By itself on top of the floor.
            alone = stage["measured_s"][loss][0] - stage["measured_s"]["floor"][0]
            assert cost["seconds"] == pytest.approx(alone)
        labels = "hard_labels" if name != "embedding" else "sum of the last hidden states"
        assert stage["floor"] == labels
        # Every step runs the teacher where a loss asks for it.
        teacher = any(loss != "hard_labels" for loss in asked["losses"])
        assert (stage["teacher_s"] > 0) == teacher


def test_the_whole_run_counts_each_stage_by_its_steps() -> None:
    losses = [{"a": {"seconds": 0.5}}, {"a": {"seconds": 1.0}, "b": {"seconds": 2.0}}]
    stages = [
        dict(name="one", steps=30, floor_s=1.0, step_s=2.0, floor_peak_gib=5.0, step_peak_gib=6.0),
        dict(name="two", steps=10, floor_s=3.0, step_s=6.0, floor_peak_gib=1.0, step_peak_gib=9.0),
    ]
    stages = [stage | {"losses": lost} for stage, lost in zip(stages, losses, strict=True)]
    found = whole(stages)
    assert found["floor_s"] == 1.5 and found["step_s"] == 3.0 and found["overhead"] == 2.0
    assert found["floor_peak_gib"] == 5.0 and found["step_peak_gib"] == 9.0
    assert found["losses"]["a"] == {"seconds": 0.625, "share": 0.625 / 3}
    assert found["losses"]["b"] == {"seconds": 0.5, "share": 0.5 / 3}


@pytest.mark.slow
def test_the_table_says_every_stage_and_loss(measured: dict) -> None:
    shown = table(measured["labelled"])
    for word in ("all", "sid", "whole run", "hidden_mse", "attention_relation", "overhead"):
        assert word in shown
    assert f"{measured['labelled']['overhead']:.3f}" in shown


def test_a_peak_is_forgotten() -> None:
    """A small piece of work after a large one has a small peak."""
    device = torch.device("cpu")

    def take(mebibytes: int) -> float:
        return peak_of(lambda: torch.ones(mebibytes, 2**18).sum(), device)

    small, large, again = take(1), take(512), take(1)
    assert large - small == pytest.approx(0.5, abs=0.05)
    assert abs(again - small) < 0.05


def test_time_within_a_step_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teachers: dict, data: dict
) -> None:
    """By a clock on which a step takes 1 s and hidden_mse 0.25 s: what it costs is seen in the step
    and in its own line, and neither in the floor nor in another loss's."""
    now = [0.0]
    real, step = objective.load, bench.train_step

    def load(name: str, *which: object) -> Callable:
        def slow(*args: object, **kwargs: object) -> object:
            now[0] += 0.25
            return real(name, *which)(*args, **kwargs)

        return slow if name == "hidden_mse" else real(name, *which)

    def counted(*args: object, **kwargs: object) -> None:
        now[0] += 1
        step(*args, **kwargs)

    monkeypatch.setattr(objective, "load", load)
    monkeypatch.setattr(bench, "train_step", counted)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = run_config(tmp_path, teachers["embedding"], data, task="embedding")
    config["stages"][0]["losses"] = {"hidden_mse": {"layers": "last"}, "embedding_mse": {}}
    config["bench"] = {"rounds": 1, "steps": 2, "out": str(tmp_path / "out.json")}
    with world_of_one() as world:
        bench.bench(configs.from_mapping(config), world)
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["floor_s"], found["step_s"], found["overhead"]) == (1.0, 1.25, 1.25)
    assert found["losses"]["hidden_mse"] == {"seconds": 0.25, "share": 0.2}
    assert found["losses"]["embedding_mse"] == {"seconds": 0.0, "share": 0.0}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not (tmp_path / "run").exists()


def test_a_process_can_join_one_world_after_another() -> None:
    """As the tests of one process do, in whatever order they come."""
    for _ in range(2):
        with world_of_one():
            model = torch.nn.Linear(2, 2)
            deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1})


@pytest.mark.parametrize("labelled", [True, False])
def test_the_floor_is_a_loss_of_its_own(teachers: dict, labelled: bool) -> None:
    """The hard labels' mean, or that of the last hidden states' sums, by themselves and beside a
    term; rows that do not count are left out."""
    torch.manual_seed(0)
    widths = objective.Widths(8, 2)
    world = World(0, 1, 0, torch.device("cpu"))
    options = {"weight": 2.0, "label_smoothing": 0.0}
    stage = objective.Objective({"hard_labels": options}, "uniform", widths, widths, "eager", world)
    keep = torch.tensor([True, True, False])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    labels = torch.tensor([0, 2, -100])
    batch = Batch({"attention_mask": mask}, keep, labels, keep)
    trace = Trace(mask.bool(), 2, logits=torch.randn(3, 4), labels=labels)
    trace.layer(1).hidden = torch.randn(3, 2, 8)
    rows = {"token": torch.tensor(3.0), "sample": torch.tensor(2.0), "labelled": torch.tensor(2.0)}
    logs = torch.log_softmax(trace.logits, -1)
    entropy = -(logs[0, 0] + logs[1, 2]) / 2
    states = trace.layers[1].hidden.sum(-1)
    wanted = entropy if labelled else (states[0].sum() + states[1, 0]) / 3
    alone = bench.Floor(stage, [], labelled)
    loss, shares = alone(trace, None, batch, rows, torch.nn.ModuleDict(), None, 0)
    torch.testing.assert_close(loss, wanted)
    assert shares.tolist() == ([entropy.item()] if labelled else [])
    with_term = bench.Floor(stage, stage.terms, labelled)
    loss, shares = with_term(trace, None, batch, rows, torch.nn.ModuleDict(), None, 0)
    # Hard labels are not trained on twice.
    torch.testing.assert_close(loss, 2 * entropy + (0 if labelled else wanted))
    # Of the student alone: the teacher shows no more than the terms ask for.
    assert alone.needs(1) == Needs()
    assert alone.needs(0).depth() is None if labelled else alone.needs(0).depth() == 2


def test_rows_that_are_left_out_are_listed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The folder of the measurement is removed."""
    found = Quarantine(max_bad=1)
    sieve = found.sieve("rows.jsonl", "line")
    sieve.rows = 3
    sieve.refuse(2, BadRow("it is bad", "mend it"), "{")
    found.add("data.train", sieve)
    config = SimpleNamespace(data=SimpleNamespace(cache=str(tmp_path)))
    monkeypatch.setattr(bench, "on_first", lambda world, work: work())
    bench.list_in_cache(SimpleNamespace(config=config, world=None, quarantine=found))
    (path,) = tmp_path.iterdir()
    row = {"data": "data.train", "source": "rows.jsonl", "line": 2}
    assert json.loads(path.read_text()) == row | {"reason": "it is bad", "content": "{"}
    said = capsys.readouterr().err
    assert "data.train: 1 of the 3 rows of 'rows.jsonl' are bad and left out (line 2: it" in said
    assert repr(str(path)) in said
