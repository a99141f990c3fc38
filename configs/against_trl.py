"""Distils a pair of decoders with `mlkd distill` and with TRL's GKDTrainer: the same chats, batches
and divergence, in fp32, on whatever device is there. Each runs in a process of its own, in turns.

    pip install trl
    python configs/against_trl.py [--steps 10] [--rounds 2] [--vocabulary 32000] [--folder FOLDER]

Prints tokens per second, what memory grows by from the first step on, and how far the two curves of
the loss are apart; writes against_trl.json into the folder. TRL: github.com/huggingface/trl.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from small_llama import END, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mlkd_dist.inputs.builtin_text import passages

SIDES = ("mlkd", "trl")
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
LEARNING_RATE = 1e-3
# Large enough that gradients which are rounding errors, such as those of words that never come, do
# not move the weights as far as others do.
EPSILON = 1e-6


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """An untrained teacher of 4 layers, a student of 2 that is half as wide, and chats in the order
    in which `mlkd distill` will take them."""
    from mlkd_dist.inputs.batches import Sampler

    words = tokenizer()
    words.pad_token, words.chat_template = END, TEMPLATE
    for seed, (name, layers, hidden) in enumerate((("teacher", 4, 512), ("student", 2, 256))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=given.vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    rows = []
    for text in passages():
        begin, end = text[: len(text) // 3], text[len(text) // 3 :].strip()
        turns = [{"role": "user", "content": begin}, {"role": "assistant", "content": end}]
        rows.append({"messages": turns})
        if len(rows) == given.batch * given.steps:
            break
    sampler = Sampler(len(rows), given.batch, 1, 0, 1, seed=0)
    order = [row for step in range(given.steps) for row in sampler.step(step)[0]]
    for name, chosen in (("mlkd", range(len(rows))), ("trl", order)):
        lines = [json.dumps(rows[i]) + "\n" for i in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines))


class Steps:
    """When each step began, how many tokens it had, and what the process held at its largest."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.tokens: list[int] = []
        self.held = 0.0

    def begin(self, mask: torch.Tensor) -> None:
        if not self.began:
            self.held = memory(peak=False)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        self.began.append(now())
        self.tokens.append(int(mask.sum()))

    def told(self, losses: list[float]) -> dict[str, Any]:
        # The first step warms up.
        seconds = [b - a for a, b in zip(self.began[1:], [*self.began[2:], now()], strict=True)]
        rate = sum(self.tokens[1:]) / sum(seconds)
        grown = memory(peak=True) - self.held
        return {"tokens_per_s": rate, "memory_mib": grown, "losses": losses, "tokens": self.tokens}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(peak: bool) -> float:
    """MiB: of the device's tensors on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return found / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def mlkd(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    from mlkd_dist import config as configs
    from mlkd_dist import distill, stage
    from mlkd_dist.engine import start, stop
    from mlkd_dist.models.model import quiet

    steps, step = Steps(), stage.train_step

    def train_step(teacher: Any, student: Any, objective: Any, batches: list, *more: Any) -> None:
        steps.begin(torch.cat([batch.inputs["attention_mask"] for batch in batches]))
        step(teacher, student, objective, batches, *more)

    stage.train_step = train_step
    losses = {"soft_labels": {"kind": "jsd", "beta": given.beta}}
    plain = {"dtype": "fp32", "zero_stage": 0}
    config = {
        "run": {"dir": str(folder / "run"), "overwrite": True, "resume": "never"},
        "teacher": {"path": str(folder / "teacher"), **plain},
        "student": {"path": str(folder / "student"), **plain},
        "task": {"kind": "causal_lm"},
        "data": {"train": str(folder / "mlkd.jsonl"), "messages": "messages", "max_length": 256},
        "stages": [{"name": "distill", "steps": given.steps, "losses": losses}],
        "optim": {"lr": LEARNING_RATE, "warmup": 0, "schedule": "constant", "weight_decay": 0}
        | {"eps": EPSILON},
        "batch": {"micro_batch": given.batch, "evaluation": given.batch},
        "log_every": 1,
    }
    # All chats are for training; what is held out is made of the same and not looked at.
    config["data"] |= {"validation": str(folder / "trl.jsonl"), "cache": str(folder / "cache")}
    distill.report = lambda *parts: told.update(steps.told(losses_of(folder / "run")))
    told: dict[str, Any] = {}
    quiet()
    distill.distill(configs.from_mapping(config), start())
    stop()
    return told


def losses_of(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/soft_labels"] for line in lines]


def trl(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    steps = Steps()

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> torch.Tensor:
            steps.begin(inputs["attention_mask"])
            return super().training_step(model, inputs, *more)

    settings = GKDConfig(
        output_dir=str(folder / "trl"),
        lmbda=0.0,
        beta=given.beta,
        temperature=1.0,
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_epsilon=EPSILON,
        max_length=256,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = InOrder(
        model=str(folder / "student"),
        teacher_model=LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
        args=settings,
        train_dataset=load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    assert trainer.model.dtype == torch.float32
    trainer.train()
    return steps.told([row["loss"] for row in trainer.state.log_history if "loss" in row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/against-trl"))
    for name, value in (("steps", 10), ("rounds", 2), ("vocabulary", 32000), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--side", choices=SIDES)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.side:
        found = {"mlkd": mlkd, "trl": trl}[given.side](folder, given)
        (folder / f"{given.side}.json").write_text(json.dumps(found))
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, given)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side in SIDES:
            words = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found[side].append(json.loads((folder / f"{side}.json").read_text()))
    (folder / "against_trl.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'':8}{'tokens/s':>12}{'MiB':>10}")
    for side, rounds in found.items():
        rate = statistics.median(each["tokens_per_s"] for each in rounds)
        grown = statistics.median(each["memory_mib"] for each in rounds)
        print(f"{side:8}{rate:12.0f}{grown:10.0f}")
    assert found["mlkd"][0]["tokens"] == found["trl"][0]["tokens"]
    ours, theirs = (found[side][0]["losses"] for side in SIDES)
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    print(f"losses {theirs[0]:.4f} to {theirs[-1]:.4f}, at most {max(apart):.1e} apart")


if __name__ == "__main__":
    main()
