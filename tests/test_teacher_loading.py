"""What a process holds while a model is read into its ZeRO-3 shares."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import start
from transformers import LlamaConfig, LlamaForCausalLM

SHARD = 24 * 10**6
SIZES = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def written(folder: Path, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_holds_more_than_its_share_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own memory; the files are mapped. With more processes each holds less."""
    large, tiny = written(tmp_path / "large", **SIZES), written(tmp_path / "tiny", **TINY)
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert len(files) > 5
    # glibc then gives back at once what is freed, and the figures are those of what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    grew: dict[int, list[int]] = {}
    for world in (1, 2):
        logs = tmp_path / f"world{world}"
        logs.mkdir()
        start("loading_peak.py", [str(tiny), str(large)], logs, world)
        said = "".join(path.read_text() for path in logs.iterdir()).splitlines()
        grew[world] = [int(line.split()[1]) for line in said if line.startswith("grew")]
        assert len(grew[world]) == world
        assert max(grew[world]) <= sum(files) / world + max(files) + 8 * 10**6, grew
    # Less than its share would mean that it was not measured.
    assert min(grew[2]) > 0.9 * sum(files) / 2
