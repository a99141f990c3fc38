"""How well models do and how alike they are, on held-out text; the report at the end of a run."""

import time
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mlkd_dist.config import Config, TeacherConfig
from mlkd_dist.data import Sampler, batches
from mlkd_dist.engine import DTYPES, World, barrier, gather_objects
from mlkd_dist.model import parameter_count
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs


class Evaluator:
    """Runs models over the held-out rows, each sharded as the teacher is, and keeps what they said."""

    def __init__(self, config: Config, task: Any, tokenizer: Any, held_out: Dataset, world: World):
        self.config, self.task, self.tokenizer = config, task, tokenizer
        self.held_out, self.world = held_out, world

    def settings(self, dtype: str, attention: str) -> TeacherConfig:
        teacher = self.config.teacher
        return TeacherConfig(
            dtype=dtype, attention=attention, zero_stage=teacher.zero_stage, offload=teacher.offload
        )

    def __call__(self, path: str, dtype: str, attention: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Outputs on all held-out rows, in their order, and what the report says of the model. The outputs are whole
        on the first process only. All processes call this."""
        settings = self.settings(dtype, attention)
        model = self.load(path, settings)
        parameters = parameter_count(model.model)
        outputs = self.outputs(model)
        model.close()
        facts: dict[str, Any] = {"path": path, "parameters": parameters}
        if self.world.first:
            facts["quality"] = self.task.quality(outputs)
            facts["latency_ms"] = self.latency(path, settings, parameters)
        barrier()
        return outputs, facts

    def load(self, path: str, settings: TeacherConfig) -> Teacher:
        needs = Needs(model=self.task.reads)
        trust = self.config.trust_remote_code
        return Teacher(path, settings, self.task.model_class, needs, self.world, trust)

    def sampler(self, world: int, rank: int) -> Sampler:
        size = min(self.config.batch.evaluation, len(self.held_out))
        return Sampler(len(self.held_out), size, 1, rank, world, seed=0, shuffle=False)

    def collate(self, rows: list[dict[str, Any]], keep: list[bool]) -> Any:
        return self.task.collate(rows, keep, self.tokenizer)

    def outputs(self, model: Teacher) -> dict[str, Tensor]:
        sampler = self.sampler(self.world.size, self.world.rank)
        found = []
        for (batch,) in batches(self.held_out, sampler, 0, sampler.steps_per_epoch, self.collate):
            batch = batch.to(self.world.device)
            found.append(self.task.outputs(model(batch), batch))
        # Processes take turns within a step, so going through steps first gives the rows in their order.
        ordered = [part for step in zip(*gather_objects(found), strict=True) for part in step]
        return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}

    def latency(self, path: str, settings: TeacherConfig, parameters: int) -> float | None:
        """Median milliseconds of one batch through the whole model on one process; None where it does not fit."""
        if self.world.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.world.device)
            if parameters * DTYPES[settings.dtype].itemsize > free / 2:
                return None
        settings.zero_stage, settings.offload = 0, "none"
        model = self.load(path, settings)
        sampler = self.sampler(1, 0)
        ((batch,),) = batches(self.held_out, sampler, 0, 1, self.collate)
        batch = batch.to(self.world.device)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            model(batch)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        model.close()
        return sorted(times)[len(times) // 2] * 1000


def table(columns: dict[str, dict[str, Any]], batch: int) -> str:
    """Models side by side: parameters, quality, agreement with the teacher, time per batch."""
    rows: dict[str, dict[str, str]] = {"parameters": {}, f"ms / batch of {batch}": {}}
    for name, facts in columns.items():
        rows["parameters"][name] = f"{facts['parameters'] / 1e6:.1f} M"
        rows[f"ms / batch of {batch}"][name] = "-" if facts["latency_ms"] is None else f"{facts['latency_ms']:.0f}"
        for kind in ("quality", "agreement"):
            for measure, value in facts.get(kind, {}).items():
                label = measure if kind == "quality" else f"{measure} with teacher"
                rows.setdefault(label, {})[name] = f"{value:.4f}"
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>20}" for name in columns)]
    lines += [f"{label:<{width}}" + "".join(f"{cells.get(n, ''):>20}" for n in columns) for label, cells in rows.items()]
    return "\n".join(lines)
