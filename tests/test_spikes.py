"""Loss spikes: what one is, where a run goes back to, and that it ends as one that never saw the
data which led to it."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS, logged, run_config, start
from safetensors.torch import load_file

from mlkd_dist.checkpoint import Checkpoints, Position
from mlkd_dist.config import RewindConfig
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.metrics import Line, drop_logged
from mlkd_dist.processes.world import World
from mlkd_dist.rules.settings import mathematics
from mlkd_dist.saving import commit
from mlkd_dist.watching.spikes import Spikes, go_back, rows
from mlkd_dist.watching.watch import Diverged

ROWS, BATCH, STEPS = 80, 4, 14
WILD = 3000.0


class Place:
    """Runs of regressions whose labels lie near 0, but for those of some steps of the data."""

    def __init__(self, base: Path, teacher: Path, validation: str):
        self.base, self.teacher, self.validation = base, teacher, validation
        draw = random.Random(0)
        self.rows = [
            {"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 20))), "label": draw.random()}
            for _ in range(ROWS)
        ]

    def write(
        self,
        name: str,
        wild: list[int],
        order: list[int] | None = None,
        zero: int = 3,
        processes: int = 1,
        **rewind: Any,
    ) -> str:
        """`order`: the data of which step are to be those of the first, second, ... one."""
        steps = [sum(data_of(step), []) for step in range(ROWS // BATCH)]
        rows = [dict(row) for row in self.rows]
        for step in wild:
            rows[steps[step][1]]["label"] = WILD
        if order is not None:
            theirs = [row for step in order for row in steps[step]]
            ours = [row for step in steps for row in step]
            rows = [rows[theirs[ours.index(i)]] for i in range(ROWS)]
        folder = self.base / name
        folder.mkdir()
        path = folder / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(path), "validation": self.validation}
        config = run_config(folder, self.teacher, data, "regression", student__zero_stage=zero)
        config["run"] |= {"checkpoint_every": 4, "checkpoint_minutes": None}
        if rewind:
            config["run"]["rewind"] = {"factor": 50, "window": 2} | rewind
        config["student"]["dropout"] = True
        config["optim"]["lr"] = 1e-3
        config["batch"] |= {"micro_batch": BATCH // 2 // processes, "grad_accum": 2}
        config["stages"] = [{"name": "only", "steps": STEPS, "losses": {"hard_labels": {}}}]
        (self.base / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return str(self.base / f"{name}.yaml")

    def run(self, name: str) -> Path:
        return self.base / name / "run"

    def said(self, name: str) -> list[str]:
        return json.loads((self.base / f"{name}.said").read_text())

    def logs(self, name: str) -> list[dict]:
        return logged({"run": {"dir": self.run(name)}})

    def losses(self, name: str) -> list[tuple]:
        return [(row["step"], row["loss/total"], row["grad_norm"]) for row in self.steps(name)]

    def steps(self, name: str) -> list[dict]:
        return [row for row in self.logs(name) if "loss/total" in row]

    def rewinds(self, name: str) -> list[dict]:
        return [row for row in self.logs(name) if "rewind/to" in row]


def data_of(step: int) -> list[list[int]]:
    return Sampler(ROWS, BATCH, 1, 0, 1, seed=0).step(step)


def same(place: Place, one: str, other: str) -> bool:
    ours, theirs = (
        load_file(place.run(name) / "export" / "model.safetensors") for name in (one, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# The data of steps 8 and 9 are skipped, those of the first checkpoint after step 8 and the spike.
WITHOUT_TWO = [step for step in range(20) if step not in (8, 9)] + [8, 9]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> Place:
    place = Place(tmp_path_factory.mktemp("two"), teachers["regression"], data["validation"])
    killed = place.write("killed", [9], processes=2, at_most=3)
    words = [place.write("back", [9], processes=2, at_most=3), f"{killed}@11", killed]
    words.append(place.write("without", [9], WITHOUT_TWO, processes=2))
    start("interrupted_runs.py", words, place.base, world=2)
    return place


def test_a_run_that_went_back_is_one_without_these_data(two: Place) -> None:
    assert two.said("back") == two.said("without") == ["done", ""], two.said("back")
    assert same(two, "back", "without")
    assert two.losses("back") == two.losses("without")
    assert [row["step"] for row in two.steps("back")] == list(range(STEPS))
    assert [row["rewinds"] for row in two.steps("back")] == [0] * 8 + [1] * 6
    (row,) = two.rewinds("back")
    told = {key: row[f"rewind/{key}"] for key in ("to", "spike", "skipped")}
    assert told == {"to": 8, "spike": 10, "skipped": 2} and row["step"] == 7
    assert row["rewind/loss"] > 50 * row["rewind/usual"] > 0
    text = (two.run("back") / "checkpoints" / "step-000012" / "manifest.json").read_text()
    (found,) = json.loads(text.splitlines()[0])["rewinds"]
    assert found["to"] == 8 and found["spike"] == 10 and found["stage"] == 0
    assert "the loss of steps 10 to 10 is" in (two.base / "rank0.log").read_text()


def test_a_kill_after_a_rewind_changes_no_bit(two: Place) -> None:
    assert two.said("killed") == ["done", ""], two.said("killed")
    assert same(two, "killed", "back")
    timing = {"rows_per_s", "teacher_share", "peak_gib"}
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in timing} for row in two.logs(name)]
        for name in ("killed", "back")
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> Place:
    """In one process, which is killed wherever it passes."""
    place = Place(tmp_path_factory.mktemp("one"), teachers["regression"], data["validation"])
    points = place.write("points", [9], zero=2, at_most=3)
    words = [f"{points}:gone back", f"{points}:rewound", points]
    words.append(place.write("without", [9], WITHOUT_TWO, zero=2))
    words.append(place.write("early", [2], zero=0, at_most=3))
    order = [*range(3, 20), 0, 1, 2]
    words.append(place.write("early without", [2], order, zero=0))
    words.append(place.write("twice", [9, 13], zero=1, at_most=2))
    words.append(place.write("hopeless", [9, 13], zero=1, at_most=1))
    start("interrupted_runs.py", words, place.base, world=1)
    return place


@pytest.mark.slow
def test_a_kill_within_a_rewind_changes_no_bit(one: Place) -> None:
    assert one.said("points") == ["done", ""], one.said("points")
    assert same(one, "points", "without") and one.losses("points") == one.losses("without")
    assert len(one.rewinds("points")) == 1
    names = sorted(path.name for path in (one.run("points") / "checkpoints").iterdir())
    assert names == ["LATEST", "step-000008", "step-000012", "step-000014"]


@pytest.mark.slow
def test_before_the_first_checkpoint_it_goes_back_to_the_start(one: Place) -> None:
    assert same(one, "early", "early without")
    (row,) = one.rewinds("early")
    assert (row["rewind/to"], row["rewind/skipped"], row["step"]) == (0, 3, -1)


@pytest.mark.slow
def test_it_goes_back_so_often_and_then_stops(one: Place) -> None:
    assert one.said("twice") == ["done", ""]
    # Once more to step 8, now also without the data of the steps since.
    found = [(row["rewind/to"], row["rewind/skipped"]) for row in one.rewinds("twice")]
    assert found == [(8, 2), (8, 4)]
    kind, message = one.said("hopeless")
    assert kind == "Diverged" and "the run went back 1 times already" in message
    assert "the loss of steps 12 to 12 is" in message and "step-000008" in message


def lines(*losses: float, counted: str = "a") -> list[Line]:
    return [Line(10, loss, [counted]) for loss in losses]


def test_a_spike_is_measured_by_what_is_usual() -> None:
    spikes = Spikes(RewindConfig(factor=3, window=50), log_every=10)
    quiet = lines(5, 1, 2, 3, 4)
    # Before the window is full, nothing is a spike; one that is not finite says nothing.
    assert [spikes.usual(line) for line in [*lines(100.0, math.nan), *quiet]] == [None] * 7
    assert spikes.usual(*lines(9.0)) is None
    assert spikes.usual(*lines(9.1)) == 3
    # It is not one of those that others are compared with, and the oldest is forgotten.
    assert list(spikes.losses) == [1, 2, 3, 4, 9.0]
    other = Spikes(RewindConfig(factor=3, window=50), log_every=10)
    other.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert other.usual(*lines(9.1)) == spikes.usual(*lines(9.1)) == 3
    # Another layer opens: the loss is a sum of more.
    assert spikes.usual(*lines(500.0, counted="b")) is None and list(spikes.losses) == [500.0]


@pytest.fixture
def checkpoints(tmp_path: Path, one_process: None) -> Checkpoints:
    return Checkpoints(tmp_path, World(0, 1, 0, torch.device("cpu")), keep=1, every=10)


def write(folder: Path) -> list[str]:
    (folder / "weights").write_bytes(b"weights")
    return ["weights"]


def test_it_goes_back_to_a_checkpoint_that_every_run_has(checkpoints: Checkpoints) -> None:
    for step in (0, 10, 20, 25, 30, 34):
        checkpoints.commit(Position(0, step), write, {"stage_done": False})
    # The newest, and two of those that are not made by the clock.
    names = ["step-000034", "step-000030", "step-000020"]
    assert commit.names(checkpoints.root) == names
    at, settings = Position(0, 36), RewindConfig(at_most=2)
    back = go_back(at, Line(10, 9.0, []), 1.0, settings, checkpoints)
    assert back == Position(0, 20, name="step-000020", skip=16)
    assert commit.names(checkpoints.root) == ["step-000020"]
    assert commit.latest(checkpoints.root) == "step-000020"
    manifest = checkpoints.newest()
    assert manifest["rewinds"] == checkpoints.rewinds and len(checkpoints.rewinds) == 1
    # What is skipped later comes on top.
    checkpoints.commit(Position(0, 30), write, {"stage_done": False})
    assert go_back(at, Line(1, 9.0, []), 1.0, settings, checkpoints).skip == 16 + 6
    with pytest.raises(Diverged, match="steps 36 to 36 is 9, usually 1, and the run went back 2"):
        go_back(at, Line(1, 9.0, []), 1.0, settings, checkpoints)
    (checkpoints.root / "step-000030" / "weights").write_bytes(b"weightz")
    checkpoints.rewinds = []
    assert go_back(at, Line(1, 9.0, []), 1.0, settings, checkpoints).name == "step-000020"
    with pytest.raises(Diverged, match="there is no checkpoint before them"):
        go_back(Position(0, 12), Line(1, 9.0, []), 1.0, settings, checkpoints)


def test_the_start_of_a_stage_can_be_gone_back_to(checkpoints: Checkpoints) -> None:
    checkpoints.commit(Position(0, 20), write, {"stage_done": False})
    checkpoints.commit(Position(0, 23), write, {"stage_done": True})
    at, found = Position(1, 4, 23, "step-000023"), Line(1, 9.0, [])
    back = go_back(at, found, 1.0, RewindConfig(), checkpoints)
    assert back == Position(1, 0, 23, start="step-000023", skip=4)


def test_each_rewind_is_logged_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss/total": 1}) + "\n" for step in range(9))
    )
    stages = [type("Stage", (), {"name": "only"})]
    first = {"stage": 0, "to": 6, "spike": 8, "skipped": 2, "loss": 9.0, "usual": 1.0}
    further = first | {"to": 4}

    def steps() -> list[tuple[int, bool]]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["step"], "rewind/to" in row) for row in found]

    for _ in range(2):
        drop_logged(tmp_path, 6, rows([first], stages))
        assert steps() == [(k, False) for k in range(6)] + [(5, True)]
    drop_logged(tmp_path, 4, rows([first, further], stages))
    assert steps() == [(k, False) for k in range(4)] + [(3, True), (3, True)]


def test_what_decides_when_to_go_back_is_mathematics(tmp_path: Path) -> None:
    from mlkd_dist.config import from_mapping

    def settings(**run: Any) -> dict[str, Any]:
        stages = [{"steps": 1, "losses": {"hidden_mse": {}}}]
        models = {"teacher": {"path": "a/b"}, "student": {"path": "a/b"}, "data": {"train": "x"}}
        return mathematics(from_mapping({"run": run, "stages": stages} | models))

    plain, rewind = settings(checkpoint_every=50), {"factor": 3}
    assert plain == settings(checkpoint_every=60)
    ours = settings(checkpoint_every=50, rewind=rewind)
    assert {key: value for key, value in ours.items() if key not in plain} == {
        "run.rewind.factor": 3.0,
        "run.rewind.window": 100,
        "run.rewind.at_most": 3,
        "run.checkpoint_every": 50,
        "log_every": 10,
    }
