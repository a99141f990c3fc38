"""What a process holds while a model is read into its ZeRO-3 shares."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import ROOT, start, world_of_one
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mlkd_dist.config import Config, TeacherConfig, UserError
from mlkd_dist.engine import check_types
from mlkd_dist.models import disk
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs

SHARD = 24 * 10**6
SIZES = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def written(folder: Path, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"tiny": written(folder / "tiny", **TINY), "large": written(folder / "large", **SIZES)}


def loaded(models: dict[str, Path], logs: Path, world: int, *words: str) -> list[dict]:
    """What each process says of the large model."""
    logs.mkdir()
    start("loading_peak.py", [str(models["tiny"]), str(models["large"]), *words], logs, world)
    said = "".join(path.read_text() for path in logs.iterdir()).splitlines()
    found = [json.loads(line) for line in said if line.startswith("{")]
    assert len(found) == world
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_holds_more_than_its_share_and_a_file(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own memory; the files are mapped. With more processes each holds less, and almost
    nothing where its share rests on a disk, of which no name is left."""
    files = [path.stat().st_size for path in models["large"].glob("*.safetensors")]
    assert len(files) > 5
    # glibc then gives back at once what is freed, and the figures are those of what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    grew: dict[int, list[int]] = {}
    for world in (1, 2):
        found = loaded(models, tmp_path / f"world{world}", world)
        grew[world] = [each["most"] for each in found]
        assert max(grew[world]) <= sum(files) / world + max(files) + 8 * 10**6, grew
        disk = tmp_path / "disk"
        there = loaded(models, tmp_path / f"disk{world}", world, str(disk))
        assert max(each["most"] for each in there) <= max(files) + 8 * 10**6
        assert max(each["rests"] for each in there) <= 8 * 10**6
        assert [each["says"] for each in there] == [each["says"] for each in found]
        assert list(disk.iterdir()) == []
    # Less than its share would mean that it was not measured.
    assert min(grew[2]) > 0.9 * sum(files) / 2


CGROUP = Path("/sys/fs/cgroup/memory")
LIMIT = 900 * 2**20


@pytest.mark.slow
def test_a_teacher_larger_than_the_memory_runs_from_a_disk(tmp_path: Path) -> None:
    """Where the system grants a process less memory than the weights take."""
    group = CGROUP / "mlkd_dist_test"
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        (group / "memory.swappiness").write_text("0")
    except OSError as error:
        pytest.skip(f"no memory can be limited here: {error}")
    large = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    models = {"tiny": written(tmp_path / "tiny", **TINY)}
    models["large"] = written(tmp_path / "large", num_hidden_layers=16, **large)
    size = sum(path.stat().st_size for path in models["large"].glob("*.safetensors"))
    assert size > LIMIT
    words = [str(path) for path in models.values()]
    program = [sys.executable, str(ROOT / "tests" / "loading_peak.py"), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    joins = f'echo $$ > {group / "cgroup.procs"}; exec "$@"'
    try:
        for more, code in ([], -signal.SIGKILL), ([str(tmp_path / "disk")], 0):
            limited = ["sh", "-c", joins, "sh", *program, *more]
            done = subprocess.run(limited, env=environment, capture_output=True, timeout=1500)
            assert done.returncode == code, done.stderr.decode()[-2000:]
    finally:
        group.rmdir()


def test_a_teacher_in_fp16_shows_what_it_is(
    teachers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ZeRO 0 and, where DeepSpeed takes the device for one of fp16, at ZeRO 3 the same bits,
    which are those of fp32 but for their rounding."""
    tokens = torch.arange(1, 13).reshape(2, 6)
    every = torch.ones(2, dtype=torch.bool)
    batch = Batch(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, every, None, every
    )
    device = deepspeed.get_accelerator()
    needs = Needs(frozenset({"embedding"}), {1: frozenset({"hidden", "query", "key"})})
    path = str(teachers["causal_lm"])
    config = Config(teacher=TeacherConfig(path=path, dtype="fp16", zero_stage=3))
    if not device.is_fp16_supported():
        with pytest.raises(UserError, match="teacher.dtype: DeepSpeed does not run fp16 on cpu"):
            check_types(config)
    monkeypatch.setattr(type(device), "is_fp16_supported", lambda _: True)
    check_types(config)
    found = {}
    with world_of_one() as world:
        for dtype, stage in (("fp32", 0), ("fp16", 0), ("fp16", 3)):
            settings = replace(config.teacher, dtype=dtype, zero_stage=stage)
            teacher = Teacher(path, settings, AutoModelForCausalLM, needs, world)
            layer = teacher(batch).layers[1]
            found[dtype, stage] = [layer.hidden, layer.query, layer.key]
            teacher.close()
    for full, half, sharded in zip(*found.values(), strict=True):
        assert half.dtype == sharded.dtype == torch.float16 and torch.equal(half, sharded)
        assert torch.allclose(half.float(), full, rtol=1e-2, atol=1e-2)


def test_a_disk_that_is_full_or_not_there_is_named(tmp_path: Path) -> None:
    weights = disk.Weights(str(tmp_path / "made" / "here"))
    given = [torch.randn(15), torch.randn(5000).bfloat16(), torch.empty(0)]
    placed = [weights.place(tensor) for tensor in given]
    assert all(map(torch.equal, placed, given))
    assert [tensor.dtype for tensor in placed] == [tensor.dtype for tensor in given]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match="is full after 0.00 GiB"):
            weights.place(torch.empty(2**19))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"offload_dir: '.*file' cannot be written"):
        disk.Weights(str(tmp_path / "file"))
