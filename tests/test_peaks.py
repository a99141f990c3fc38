"""The peak that `mlkd plan` tells, against that of processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LOGIT_LOSSES, WORDS, run_config, start, write_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from mlkd_dist import config as configs
from mlkd_dist.planning import footprint
from mlkd_dist.planning.cluster import Cluster
from mlkd_dist.planning.estimate import Choice, estimate
from mlkd_dist.planning.model_sizes import models_of
from mlkd_kernels.streamed import linear_divergence

LENGTH, VOCABULARY = 128, 8000
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    intermediate_size=1536,
    max_position_embeddings=256,
)
# Task, student's and teacher's ZeRO stage, and what else differs from fp32 and sdpa.
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "encoder_2_3": ("classification", 2, 3, {}),
    "encoder_3_3_checkpointing": (
        "classification",
        3,
        3,
        {"activation_checkpointing": "non_reentrant"},
    ),
    "encoder_0_3_eager": ("classification", 0, 3, {"attention": "eager"}),
    "encoder_words_1_0": ("masked_lm", 1, 0, {}),
    "decoder_2_3": ("causal_lm", 2, 3, {}),
    "decoder_3_3": ("causal_lm", 3, 3, {}),
}
# Of all that is sharded here a process holds less where there are more of them.
SHARDED = "decoder_3_3"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("peaks")
    bert = BertConfig(**SIZES, num_labels=3)
    teachers = {
        "classification": write_model(base / "bert", bert, AutoModelForSequenceClassification),
        "masked_lm": write_model(base / "words", bert, AutoModelForMaskedLM),
        "causal_lm": write_model(base / "llama", LlamaConfig(**SIZES), AutoModelForCausalLM),
    }
    # All as long as the longest, so that nothing is padding.
    rows = [{"text": " ".join(WORDS[i % 7 :] * 25), "label": i % 3} for i in range(64)]
    for name in ("train", "validation"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (base / f"{name}.jsonl").write_text("".join(lines))
    data = {name: str(base / f"{name}.jsonl") for name in ("train", "validation")}
    found = {}
    for name, (task, student, teacher, more) in CASES.items():
        config = run_config(base, teachers[task], data, task)
        losses = {"hidden_mse": {}, "attention_relation": {"splits": 6}} | LOGIT_LOSSES
        config["stages"][0]["losses"] = losses
        config["data"]["max_length"] = LENGTH
        config["student"] |= {"from_teacher": {"layers": 4}, "zero_stage": student} | more
        config["teacher"] |= {"zero_stage": teacher} | {
            key: more[key] for key in ("dtype", "attention") if key in more
        }
        config["batch"] |= {"micro_batch": 8}
        config["bench"] = {"steps": 2}
        zero = {"reduce_bucket_size": 2_000_000}
        if student == 3:
            zero["stage3_param_persistence_threshold"] = 0
        config["deepspeed"] = {"zero_optimization": zero}
        found[name] = str(base / f"{name}.yaml")
        Path(found[name]).write_text(yaml.safe_dump(config))
    return found


def predicted(path: str, processes: int = 2) -> Any:
    config = configs.load(path)
    checkpointing = config.student.activation_checkpointing != "none"
    stages = config.teacher.zero_stage, "world", config.student.zero_stage
    choice = Choice(*stages, "none", checkpointing)
    cluster = Cluster(nodes=1, gpus_per_node=processes)
    return estimate(config, models_of(config), cluster, choice, config.batch.micro_batch)


def measured(paths: list[str], logs: Path, processes: int) -> dict[str, float]:
    """By how many bytes a process grows, by case."""
    logs.mkdir()
    start("peak_runs.py", paths, logs, processes, limit=1800)
    lines = (logs / "rank0.log").read_text().splitlines()
    told = [json.loads(line) for line in lines if line.startswith('{"name"')]
    return {found["name"]: found["grew"] for found in told}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_what_was_planned(
    cases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15 %, of two processes; and of one and four where both models are sharded: it falls by
    their states."""
    # glibc then gives back at once what is freed.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    # As the kernel does it on a CPU.
    monkeypatch.setattr(footprint, "HEAD_BYTES", 0)
    monkeypatch.setattr(footprint, "MIN_TOKENS", linear_divergence.CPU_TOKENS)
    off, held, states = {}, [], []
    for processes in (1, 2, 4):
        some = cases if processes == 2 else {SHARDED: cases[SHARDED]}
        grew = measured([*some.values()], tmp_path / f"{processes}", processes)
        for name, path in some.items():
            plan = predicted(path, processes)
            off[name, processes] = grew[name] / plan.total - 1
            if name == SHARDED:
                parts = plan.teacher_weights, plan.student_weights, plan.gradients, plan.optimizer
                held.append(grew[name])
                states.append(sum(parts))
    print("above the plan:", {key: f"{part:.1%}" for key, part in off.items()})
    assert all(abs(part) <= 0.15 for part in off.values()), off
    assert held[0] > held[1] > held[2]
    assert held[0] - held[2] >= 0.7 * (states[0] - states[2]), (held, states)
