"""`mlkd export`: an export is read back, copied, merged to ordinary weights; or refused in one
sentence."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import world_of_one
from test_low_rank import student_of, teacher_of
from test_trace import text
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import mlkd_dist
from mlkd_dist import cli
from mlkd_dist.checkpoint import Checkpoints, Position
from mlkd_dist.config import HEADER
from mlkd_dist.processes.world import World

CLASSES = AutoModelForSequenceClassification


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves that trained a factorised student."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(HEADER)
    teacher = teacher_of("Bert", tmp_path / "teacher", CLASSES)
    student_of(teacher, run / "export", CLASSES)
    return run


@pytest.fixture
def mlkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple]:
    """Words -> exit code, what was printed, what was complained of."""

    def started(*words: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["mlkd", "export", *map(str, words)])
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out, [line for line in said.err.splitlines() if line.startswith("mlkd:")]

    return started


def test_without_a_place_it_is_only_read(run: Path, mlkd: Callable) -> None:
    before = sorted(run.rglob("*"))
    code, said, _ = mlkd(run)
    assert code == 0 and sorted(run.rglob("*")) == before
    student = mlkd_dist.load_student(run / "export")
    numbers = sum(p.numel() for p in student.parameters())
    assert f"BertForSequenceClassification, {numbers:,} parameters" in said
    assert f"mlkd_dist.load_student('{run}/export')" in said


def test_the_student_of_an_earlier_stage_is_not_handed_out(
    run: Path, tmp_path: Path, mlkd: Callable
) -> None:
    stage = "{steps: 1, losses: {hidden_mse: {}}}"
    (run / "config.yaml").write_text(
        f"{HEADER}stages: [{stage}, {stage}]\ndata: {{train: rows.jsonl}}\n"
    )
    checkpoints = Checkpoints(run, World(0, 1, 0, torch.device("cpu")), keep=2)

    def at(stage: int, step: int, done: bool) -> None:
        with world_of_one():
            checkpoints.commit(Position(stage, step, stage), lambda _: [], {"stage_done": done})

    for number, (stage, step, finished) in enumerate(((0, 1, True), (1, 1, False), (1, 2, True))):
        at(stage, step, finished)
        code, _, said = mlkd(run, tmp_path / f"out-{number}")
        if finished and stage == 1:
            assert code == 0
        else:
            assert code == 2 and "is not done, and its export is that of an earlier" in said[0]


def test_a_copy_is_the_same_student(run: Path, tmp_path: Path, mlkd: Callable) -> None:
    code, said, _ = mlkd(run, tmp_path / "a" / "copy")
    assert code == 0 and f"load_student('{tmp_path}/a/copy')" in said
    files = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    copied = {path.name: path.read_bytes() for path in (tmp_path / "a" / "copy").iterdir()}
    assert copied == files and [p.name for p in (tmp_path / "a").iterdir()] == ["copy"]


@pytest.mark.parametrize("out", [None, "merged"])
def test_dense_is_an_ordinary_folder(
    run: Path,
    tmp_path: Path,
    mlkd: Callable,
    out: str | None,
) -> None:
    place = run / "export-dense" if out is None else tmp_path / out
    given = [] if out is None else [place]
    code, said, _ = mlkd(run, *given, "--dense")
    assert code == 0
    assert f"transformers.BertForSequenceClassification.from_pretrained('{place}')" in said
    factors = mlkd_dist.load_student(run / "export")
    dense = CLASSES.from_pretrained(place).eval()
    assert torch.allclose(dense(**text()).logits, factors(**text()).logits, atol=1e-5)
    assert "mlkd" not in (place / "config.json").read_text()
    assert [path.name for path in place.glob("*.safetensors")] == ["model.safetensors"]
    assert not (place / "README.md").exists()
    assert AutoTokenizer.from_pretrained(place)("w1")["input_ids"] == [2, 6, 3]
    assert (run / "export" / "model.low_rank.safetensors").exists()


def test_an_ordinary_student_is_copied(tmp_path: Path, mlkd: Callable) -> None:
    run = tmp_path / "run"
    teacher_of("Bert", run / "export")
    (run / "config.yaml").write_text(HEADER)
    code, said, _ = mlkd(run, tmp_path / "copy")
    assert code == 0 and "transformers.BertModel.from_pretrained" in said
    ours, theirs = (
        AutoModel.from_pretrained(p).eval() for p in (tmp_path / "copy", run / "export")
    )
    assert torch.equal(ours(**text())[0], theirs(**text())[0])
    code, _, said = mlkd(run, tmp_path / "dense", "--dense")
    assert code == 2 and "no factors to merge" in said[0] and not (tmp_path / "dense").exists()


REFUSED = {
    "nowhere": "is no run folder; give the run.dir of",
    "teacher": "is no run folder",
    "young": "has no export yet; run `mlkd distill`",
    "run teacher": "is there already; choose another folder",
    "run run/export/inside": "is the export itself or lies in it",
    "run run/config.yaml": "is there already",
    "run run/config.yaml/below": "cannot be written, since",
    "broken": "cannot be loaded",
    "broken copy": "cannot be loaded",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_gets_one_sentence(
    run: Path,
    tmp_path: Path,
    mlkd: Callable,
    words: str,
) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text(HEADER)
    if words.startswith("broken"):
        run.rename(tmp_path / "broken")
        weights = tmp_path / "broken" / "export" / "model.low_rank.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    code, _, said = mlkd(*(tmp_path / word for word in words.split()))
    assert code == 2 and len(said) == 1, said
    assert said[0].startswith("mlkd: error: ") and REFUSED[words] in said[0], said
    assert not list(tmp_path.glob("copy*"))
