"""Memory over many steps of two engines in one process."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import logged, run_config, start


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_200_steps(tmp_path: Path, teachers: dict, data: dict) -> None:
    """Of a teacher and a student at ZeRO 3."""
    config = run_config(tmp_path, teachers["classification"], data)
    losses = {"attention_relation": {"splits": 2}, "hidden_mse": {}, "soft_labels": {}}
    config["stages"] = [{"name": "one", "steps": 200, "losses": losses}]
    config["student"]["zero_stage"] = config["teacher"]["zero_stage"] = 3
    config["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config["batch"] |= {"micro_batch": 2}
    config["log_every"] = 20
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    start("steady_run.py", [str(path)], tmp_path, 2, limit=1200)
    assert logged(config)[-1]["step"] == 199
    for rank in (0, 1):
        seen = json.loads(Path(f"{path}.{rank}.json").read_text())
        assert len(seen) == 10
        tensors, memory = zip(*seen, strict=True)
        # Log lines that wait to be written are a few numbers.
        assert max(tensors[1:]) - min(tensors[1:]) < 20_000, tensors
        # A leaked trace of a step would be 150 kB, its weights 300 kB: in 140 steps 20 MB and more.
        assert memory[-1] - memory[2] < 8 * 10**6, memory
