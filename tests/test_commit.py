"""The protocol that makes a checkpoint whole or not there: processes that end anywhere, files that
change."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import cuts, flipped

from mlkd_dist.saving import commit
from mlkd_dist.saving.commit import LATEST, MANIFEST, PARTIAL, REJECTED, Rejected

RANKS = 3


def content(step: int, rank: int) -> bytes:
    return random.Random(step * RANKS + rank).randbytes(999 + rank)


def save(root: Path, step: int, keep: int = 2, start: str | None = None) -> None:
    """As checkpoint.py does it, all ranks in turn."""
    name = commit.step_name(step)
    folder = commit.begin(root, name)
    sealed = {}
    for rank in range(RANKS):
        (folder / f"rank-{rank:05d}.safetensors").write_bytes(content(step, rank))
        commit.reached("written")
        sealed |= commit.seal_files(folder, [f"rank-{rank:05d}.safetensors"])
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text(f"{{{step}}}")
    sealed |= commit.seal_files(folder, ["export/config.json"])
    commit.commit(root, name, {"step": step, "start": start, "files": sealed})
    commit.prune(root, keep)


def check(root: Path, name: str) -> dict:
    manifest = commit.read_manifest(root / name)
    commit.check_names(root / name, manifest)
    commit.check_files(root / name, manifest, manifest["files"])
    return manifest


def newest(root: Path) -> int | None:
    """The step of the newest sound checkpoint."""
    for name in commit.names(root):
        try:
            manifest = check(root, name)
        except Rejected:
            continue
        for rank in range(RANKS):
            held = (root / name / f"rank-{rank:05d}.safetensors").read_bytes()
            assert held == content(manifest["step"], rank)
        return manifest["step"]
    return None


def points_of(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    passed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(commit, "reached", passed.append)
        work()
    return passed


def end_at(number: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`work` in a process that is gone, without any clean-up, at the point of this number."""
    left = iter(range(number, -1, -1))
    with monkeypatch.context() as patch:
        patch.setattr(commit, "reached", lambda point: next(left) or os._exit(9))
        if (child := os.fork()) == 0:
            work()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_that_ends_anywhere_leaves_a_sound_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every point of a save that also removes older ones, and then once more in the save that
    follows it."""
    first = tmp_path / "first"
    for step in (10, 20, 30):
        save(first, step)
    (first / ("step-000025" + REJECTED)).mkdir()

    def copy(name: str) -> Path:
        return shutil.copytree(first, tmp_path / name)

    counted = copy("counted")
    points = points_of(lambda: save(counted, 40), monkeypatch)
    assert len(points) > 12
    committed = points.index("renamed")
    for number, point in enumerate(points):
        root = copy(f"{number}")
        end_at(number, lambda root=root: save(root, 40), monkeypatch)
        assert newest(root) == (40 if number >= committed else 30), point
        # What a run does next: it saves again, at the step that may be half there.
        save(root, 40)
        assert newest(root) == 40, point
        assert sorted(path.name for path in root.iterdir()) == [
            LATEST,
            "step-000030",
            "step-000040",
        ]
        assert commit.latest(root) == "step-000040"


def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "step-000010"
    draw = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == RANKS + 2
    for path in files:
        whole = path.read_bytes()
        places = range(len(whole)) if path.name == MANIFEST else draw.sample(range(len(whole)), 4)
        damaged = [flipped(whole, place, draw.randrange(8)) for place in places]
        for wrong in [*damaged, *cuts(whole)]:
            path.write_bytes(wrong)
            with pytest.raises(Rejected):
                check(tmp_path, folder.name)
        path.write_bytes(whole)
        for _ in range(10):
            check(tmp_path, folder.name)


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 10)
    folder = tmp_path / "checkpoints" / "step-000010"
    (tmp_path / "outside").write_text("secret")
    manifest = commit.read_manifest(folder)
    for name in (
        "../outside",
        "../../outside",
        "/etc/passwd",
        "export/../../x",
        ".hidden",
        "a/b/c",
    ):
        wrong = manifest | {"files": manifest["files"] | {name: {"bytes": 6, "xxh3": ""}}}
        with pytest.raises(Rejected, match="no file of a checkpoint"):
            commit.check_names(folder, wrong)
    (folder / "rank-00000.safetensors").unlink()
    (folder / "rank-00000.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(Rejected, match="no plain file"):
        check(folder.parent, folder.name)


def test_files_that_no_manifest_knows_are_refused(tmp_path: Path) -> None:
    """A model folder is read as a whole: a file put into it would be read too."""
    save(tmp_path, 10)
    (tmp_path / "step-000010" / "export" / "adapter_config.json").write_text("{}")
    with pytest.raises(Rejected, match="adapter_config.json is not in its manifest"):
        check(tmp_path, "step-000010")


def test_a_format_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "FORMAT", commit.FORMAT + 1)
    save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(Rejected, match="format"):
        commit.read_manifest(tmp_path / "step-000010")


def test_what_a_kept_checkpoint_starts_from_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for step in (20, 30, 40):
        save(tmp_path, step, keep=2, start="step-000010")
    assert commit.names(tmp_path) == ["step-000040", "step-000030", "step-000010"]
    save(tmp_path, 50, keep=1)
    assert commit.names(tmp_path) == ["step-000050"]


def test_a_rejected_one_makes_room_and_goes_when_a_newer_one_is_sound(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-000020" / MANIFEST).write_text("{}")
    commit.reject(tmp_path, "step-000020")
    assert commit.names(tmp_path) == ["step-000010"]
    save(tmp_path, 15)
    assert (tmp_path / ("step-000020" + REJECTED)).is_dir()
    save(tmp_path, 20)
    assert commit.names(tmp_path) == ["step-000020", "step-000015"]
    assert not list(tmp_path.glob(f"*{REJECTED}")) and not list(tmp_path.glob(f"*{PARTIAL}"))


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    """Sums of a step that was skipped too."""
    numbers = [0.1 + 0.2, 5e-324, 1e308, float("inf"), float("nan")]
    (tmp_path / MANIFEST).write_text(commit.manifest_text({"sums": numbers}))
    assert str(commit.read_manifest(tmp_path)["sums"]) == str(numbers)
