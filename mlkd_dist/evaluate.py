"""How well models do and how alike they are, on held-out text; the report at the end of a run."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlkd_dist.config import TeacherConfig
from mlkd_dist.engine import DTYPES
from mlkd_dist.generation.answers import Answers
from mlkd_dist.inputs.batches import Sampler, batches
from mlkd_dist.layer_map import layer_pairs
from mlkd_dist.losses import attention_kl
from mlkd_dist.low_rank import HOW_TO_LOAD, ranks_of
from mlkd_dist.models.model import parameter_count, read_config
from mlkd_dist.processes.world import all_reduce, barrier, gather_objects
from mlkd_dist.rules.shapes import shape
from mlkd_dist.run import Run
from mlkd_dist.saving import fingerprints
from mlkd_dist.saving.commit import names, told, write_whole
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs, Trace

# What a model said of every held-out row, and what the report tells of it.
Evaluation = tuple[dict[str, Tensor], dict[str, Any]]


class Evaluator:
    """Runs models over the held-out rows, each sharded as the teacher is."""

    def __init__(self, run: Run):
        self.run, self.config, self.task, self.world = run, run.config, run.task, run.world
        self.answers = Answers(run)

    def settings(self, dtype: str, attention: str) -> TeacherConfig:
        teacher = self.config.teacher
        return TeacherConfig(
            dtype=dtype,
            attention=attention,
            zero_stage=teacher.zero_stage,
            shard_group=teacher.shard_group,
            offload=teacher.offload,
            offload_dir=teacher.offload_dir,
        )

    def __call__(self, path: str, dtype: str, attention: str, timed: bool = True) -> Evaluation:
        """Outputs on all held-out rows, in their order, and what the report says of the model. The
        outputs are whole on the first process only. All processes call this."""
        settings, needs = self.settings(dtype, attention), Needs(model=self.task.reads)
        model = self.load(path, settings, needs)
        parameters = parameter_count(model.model)
        outputs, answers = self.outputs(model), self.answers.of(model)
        model.close()
        facts: dict[str, Any] = {"path": path, "parameters": parameters}
        if self.world.first:
            facts["quality"] = self.task.quality(outputs) | self.answers.quality(answers)
            facts["latency_ms"] = self.latency(path, settings, needs, parameters) if timed else None
        barrier()
        return outputs, facts

    def load(self, path: str, settings: TeacherConfig, needs: Needs) -> Teacher:
        trust = self.config.trust_remote_code
        return Teacher(path, settings, self.task.model_class, needs, self.world, trust)

    def sampler(self, world: int, rank: int) -> Sampler:
        size = min(self.config.batch.evaluation, len(self.run.held_out))
        return Sampler(len(self.run.held_out), size, 1, rank, world, seed=0, shuffle=False)

    def collate(self, rows: list[dict[str, Any]], keep: list[bool]) -> Any:
        return self.task.collate(rows, keep, self.run.tokenizer)

    def batches(self) -> Iterator[Batch]:
        """The held-out rows of this process, on its device."""
        sampler = self.sampler(self.world.size, self.world.rank)
        steps = sampler.steps_per_epoch
        for (batch,) in batches(self.run.held_out, sampler, 0, steps, self.collate):
            yield batch.to(self.world.device)

    def outputs(self, model: Callable[[Batch], Trace]) -> dict[str, Tensor]:
        found = [self.task.outputs(model(batch), batch) for batch in self.batches()]
        # Processes take turns within a step, so going through steps first gives the rows in their
        # order.
        ordered = [part for step in zip(*gather_objects(found), strict=True) for part in step]
        return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}

    def latency(
        self, path: str, settings: TeacherConfig, needs: Needs, parameters: int
    ) -> float | None:
        """Median milliseconds of one batch through the whole model, and what the task takes of it,
        on one process; None where it does not fit."""
        if self.world.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.world.device)
            if parameters * DTYPES[settings.dtype].itemsize > free / 2:
                return None
        settings.zero_stage, settings.offload = 0, "none"
        model = self.load(path, settings, needs)
        sampler = self.sampler(1, 0)
        ((batch,),) = batches(self.run.held_out, sampler, 0, 1, self.collate)
        batch = batch.to(self.world.device)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            self.task.outputs(model(batch), batch)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        model.close()
        return sorted(times)[len(times) // 2] * 1000


@torch.no_grad()
def attention_divergence(evaluator: Evaluator, path: str) -> float | None:
    """How far the attention maps of the student in `path` are from the teacher's, in nats:

        sum over pairs (k, m) of the uniform layer map of the mean over heads and real tokens i of
        KL(P_i || Q_i), P_i the map of i in the teacher's layer m, Q_i in the student's layer k.

    None where the models have not as many heads, or the student is deeper. All processes call this
    and get the same number. Aguilar et al. 2020 (arXiv 1910.03723) show one head of one sentence.
    """
    config, world = evaluator.config, evaluator.world
    sides = ((path, config.student), (config.teacher.path, config.teacher))
    student, teacher = (
        shape(read_config(path, config.trust_remote_code).to_dict()) for path, _ in sides
    )
    if student.heads != teacher.heads or student.layers > teacher.layers:
        return None
    pairs = layer_pairs("uniform", student.layers, teacher.layers)
    models = []
    for side, (name, asked) in enumerate(sides):
        needs = Needs(layers={pair[side]: frozenset(attention_kl.READS) for pair in pairs})
        settings = evaluator.settings(asked.dtype, asked.attention)
        models.append(evaluator.load(name, settings, needs))
    total = torch.zeros(2, dtype=torch.float64, device=world.device)  # divergence, tokens
    for batch in evaluator.batches():
        ours, theirs = (model(batch).layers for model in models)
        for k, m in pairs:
            rows = attention_kl.attention_kl(ours[k], theirs[m], backend=config.kernels)
            total[0] += (rows.double().mean(1) * batch.mask).sum()
        total[1] += batch.mask.sum()
    for model in models:
        model.close()
    divergence, tokens = all_reduce(total).tolist()
    return divergence / tokens


def table(columns: dict[str, dict[str, Any]], batch: int) -> str:
    """Models side by side: parameters, quality, agreement with the teacher, time per batch."""
    rows: dict[str, dict[str, str]] = {"parameters": {}, f"ms / batch of {batch}": {}}
    for name, facts in columns.items():
        rows["parameters"][name] = f"{facts['parameters'] / 1e6:.1f} M"
        rows[f"ms / batch of {batch}"][name] = (
            "-" if facts["latency_ms"] is None else f"{facts['latency_ms']:.0f}"
        )
        for kind in ("quality", "agreement"):
            for measure, value in facts.get(kind, {}).items():
                label = measure if kind == "quality" else f"{measure} with teacher"
                rows.setdefault(label, {})[name] = f"{value:.4f}"
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>20}" for name in columns)]
    lines += [
        f"{label:<{width}}" + "".join(f"{cells.get(n, ''):>20}" for n in columns)
        for label, cells in rows.items()
    ]
    return "\n".join(lines)


def best_student(folder: Path) -> dict[str, Any] | None:
    """Which one the last stage of a run that is done had, by its last checkpoint."""
    root = folder / "checkpoints"
    newest = next(iter(names(root)), None)
    found = told(root / newest).get("best") if newest else None
    return found and {key: found[key] for key in ("step", "measure", "value")}


def student_before(folder: Path) -> dict[str, Any] | None:
    """As an earlier report of this run had it."""
    try:
        return json.loads((folder / "report.json").read_text()).get("student_before")
    except FileNotFoundError:
        return None


def report(evaluator: Evaluator, before: Evaluation | None = None, written: bool = True) -> None:
    """report.json where it is to be written, and a table: the teacher beside the student before and
    after. What an earlier report said of the student before stays."""
    run = evaluator.run
    config, world = run.config, run.world
    student, student_path = config.student, str(run.folder / "export")
    found = {"student": evaluator(student_path, student.dtype, student.attention)}
    if before is not None:
        found = {"student before": before} | found
    if config.teacher.path is not None:
        teacher = config.teacher
        found = {"teacher": evaluator(teacher.path, teacher.dtype, teacher.attention)} | found
    maps = attention_divergence(evaluator, student_path) if config.run.compare_maps else None
    if world.first:
        for name, (outputs, facts) in found.items():
            if "teacher" in found and name != "teacher":
                facts["agreement"] = run.task.agreement(outputs, found["teacher"][0])
        if maps is not None:
            found["student"][1]["agreement"]["attention_kl"] = maps
        columns = {name: facts for name, (_, facts) in found.items()}
        if written and before is None and (earlier := student_before(run.folder)):
            columns = columns | {"student before": earlier, "student": columns.pop("student")}
        facts = {name.replace(" ", "_"): facts for name, facts in columns.items()}
        if best := best_student(run.folder):
            facts["best"] = best
        if "teacher" in found:
            facts["teacher_fingerprint"] = fingerprints.model(
                teacher.path, config.trust_remote_code
            )
        facts["held_out_rows"] = len(run.held_out)
        facts["bad_rows"] = run.quarantine.counts
        if evaluator.answers.examples:
            facts["answered_rows"] = len(evaluator.answers.examples)
        if written:
            write_whole(run.folder / "report.json", json.dumps(facts, indent=2) + "\n")
        print(f"\n{table(columns, min(config.batch.evaluation, len(run.held_out)))}\n")
        print(f"held out: {len(run.held_out)} texts   student: {run.folder / 'export'}")
        if best:
            print(
                f"best while training: {best['measure']} {best['value']:.4f}, step {best['step']}"
            )
        if ranks_of(read_config(str(run.folder / "export"))):
            print(HOW_TO_LOAD.replace("\n", " "))
        print(f"curves: tensorboard --logdir {run.folder / 'tb'}", flush=True)
    barrier()
