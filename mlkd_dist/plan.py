"""`mlkd plan`: memory per process and traffic per step of a run, before it waits in a queue.

From config files alone: models are built on the meta device, no weights are read, nothing is
started. The formulas are in footprint.py.
"""

import copy
import json
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from mlkd_dist import config as configs
from mlkd_dist import footprint, tasks
from mlkd_dist.config import Config, FromTeacherConfig, UserError, nearest
from mlkd_dist.engine import World
from mlkd_dist.footprint import GIB, Size, Wire
from mlkd_dist.linears import matrix_sizes, sizes
from mlkd_dist.low_rank import targets
from mlkd_dist.model import cut_layers, read_config
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.shapes import refuse_type, shape
from mlkd_dist.student import FEED_FORWARD, cut_config
from mlkd_dist.trace import Needs, layer_modules

WIDTHS = {"fp32": 4, "bf16": 2}
LARGEST_BATCH = 2**20


@dataclass
class Cluster:
    """The words of `mlkd plan` that are not settings of the run."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    """GiB of one GPU."""
    reserve: float = 3.0
    """GiB that are not for tensors: CUDA, NCCL, gaps."""
    bandwidth: float | None = None
    """GB/s that one GPU sends; with it, traffic is told in seconds too."""
    tflops: float | None = None
    """TFLOP/s that one GPU reaches in practice; with it, arithmetic is told in seconds too."""
    out: str | None = None
    """A file for the recommended config."""
    json: str | None = None
    """A file for the plan."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Models:
    """The sizes of a run: of all its stages the largest, each number by itself."""

    teacher: Size | None
    student: Size
    # Numbers per token and per sample that a trace keeps, and that losses hold in fp32.
    teacher_trace: tuple[int, int]
    student_trace: tuple[int, int]
    compared: int
    # fp32 numbers per sample that go to every process.
    gathered: int
    reads_head: bool


@dataclass(frozen=True)
class Choice:
    teacher_zero: int
    student_zero: int
    teacher_offload: bool
    checkpointing: bool


@dataclass(frozen=True)
class Plan:
    """Bytes of one process under a choice, for one micro-batch."""

    choice: Choice
    micro_batch: int
    teacher_weights: float
    student_weights: float
    gradients: float
    optimizer: float
    activations: float
    traces: float
    logits: float
    buffers: float
    host: float
    wire: Wire
    flops: float  # of a step

    @property
    def total(self) -> float:
        """Of the device, at the peak."""
        names = ("teacher_weights", "student_weights", "gradients", "optimizer", "activations")
        return sum(getattr(self, name) for name in (*names, "traces", "logits", "buffers"))


def main(path: str, words: list[str]) -> str:
    """Writes what is asked for and returns the table. Raises UserError."""
    cluster, settings = cluster_of(words)
    config = configs.load(path, settings)
    if config.kernels == "eager":
        raise UserError("kernels: eager builds matrices of L x L for tests; plan with auto.")
    models = models_of(config)
    plans = [
        estimate(config, models, cluster, choice, config.batch.micro_batch)
        for choice in choices(config)
    ]
    best = recommended(config, models, cluster)
    found = {
        "cluster": asdict(cluster),
        "teacher_parameters": models.teacher.parameters if models.teacher else 0,
        "student_parameters": models.student.parameters,
        "choices": [
            told(plan, largest_micro_batch(config, models, cluster, plan.choice), cluster)
            for plan in plans
        ],
        "recommended": None if best is None else told(best, best.micro_batch, cluster),
    }
    if cluster.json is not None:
        Path(cluster.json).write_text(json.dumps(found, indent=2) + "\n")
    if cluster.out is not None:
        if best is None:
            raise UserError("out: nothing fits, so there is no config to recommend; see the plan.")
        configs.save(with_choice(config, best, cluster), Path(cluster.out))
    return table(found, config, cluster)


def cluster_of(words: list[str]) -> tuple[Cluster, list[str]]:
    """The cluster, and the words that are settings of the run."""
    cluster, settings = Cluster(), []
    kinds = {field.name: type(field.default) for field in fields(Cluster)}
    for word in words:
        key, _, value = word.partition("=")
        if key not in kinds:
            if "." not in key and key not in ("log_every", "kernels", "trust_remote_code"):
                close = nearest(key, list(kinds))
                raise UserError(f"argument {word!r}: there is no such setting of a plan{close}.")
            settings.append(word)
            continue
        number = {"nodes": int, "gpus_per_node": int, "out": str, "json": str}.get(key, float)
        try:
            setattr(cluster, key, number(value))
        except ValueError as error:
            raise UserError(f"argument {word!r}: {key} is a number.") from error
    for key in ("nodes", "gpus_per_node", "gpu_memory", "bandwidth", "tflops"):
        given = getattr(cluster, key)
        if given is not None and not given > 0:
            raise UserError(f"{key}: {given} is not allowed; give more than 0.")
    for key in ("out", "json"):
        place = getattr(cluster, key)
        if place is not None and not Path(place).parent.is_dir():
            raise UserError(f"{key}: {place!r} cannot be written; there is no such folder.")
    return cluster, settings


def models_of(config: Config) -> Models:
    trust = config.trust_remote_code
    teacher = read_config(config.teacher.path, trust) if config.teacher.path else None
    student = (
        read_config(config.student.path, trust)
        if config.student.path
        else cut_config(teacher, config.student.from_teacher or FromTeacherConfig())
    )
    for key, found in (("teacher.path", teacher), ("student.path", student)):
        if found is not None:
            refuse_type(key, found.model_type)
    objectives = [objective(config, index, student, teacher) for index in range(len(config.stages))]
    ours = built(config, student, tasks.load(config.task.kind).model_class, "student")
    projections = max(count(o.projections()) for o in objectives)
    parameters = count(ours) + projections - saved_by_factors(config, ours)
    student_size = replace(size_of(config, student, ours), parameters=parameters)
    student_trace = trace_of(student, ours, [o.needs(0) for o in objectives])
    # What the teacher said before is read from files, a batch of it at a time.
    reading = [o for o in objectives if o.reads_teacher and config.teacher.cache is None]
    if not reading:
        return Models(None, student_size, (0, 0), student_trace, 0, 0, reads_head(objectives))
    deepest = deepest_needs(reading)
    theirs = built(config, cut_to(teacher, deepest), teacher_class(config, deepest), "teacher")
    teacher_trace = trace_of(teacher, theirs, [o.needs(1) for o in reading])
    return Models(
        size_of(config, cut_to(teacher, deepest), theirs),
        student_size,
        teacher_trace,
        student_trace,
        teacher_trace[0] + student_trace[0],
        max(2 * teacher.hidden_size * len(o.batch_terms) for o in objectives),
        reads_head(objectives),
    )


def objective(
    config: Config, index: int, student: PreTrainedConfig, teacher: PreTrainedConfig | None
) -> Objective:
    """Of one stage, with projections on the meta device."""

    def widths(found: PreTrainedConfig | None) -> Widths | None:
        return found and Widths(found.hidden_size, found.num_hidden_layers)

    stage, nowhere = config.stages[index], World(0, 1, 0, torch.device("meta"))
    made = Objective(
        stage.losses,
        stage.layers,
        widths(student),
        widths(teacher),
        "streamed",
        nowhere,
        tasks.load(config.task.kind).vocabulary,
    )
    with torch.device("meta"):
        maps = made.projections()
    made.projections = lambda: maps
    return made


def reads_head(objectives: list[Objective]) -> bool:
    return any("head" in made.needs(0).model for made in objectives)


def deepest_needs(objectives: list[Objective]) -> Needs:
    needs = [made.needs(1) for made in objectives]
    return max(needs, key=lambda n: float("inf") if n.depth() is None else n.depth())


def cut_to(teacher: PreTrainedConfig, needs: Needs) -> PreTrainedConfig:
    """As deep as a run loads it."""
    depth = needs.depth()
    if depth is None or depth >= teacher.num_hidden_layers:
        return teacher
    return cut_layers(teacher, list(range(depth)))


def teacher_class(config: Config, needs: Needs) -> Any:
    return (
        tasks.load(config.task.kind).model_class if needs.model & {"logits", "head"} else AutoModel
    )


def built(config: Config, found: PreTrainedConfig, model_class: Any, who: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return model_class.from_config(
                found, attn_implementation="eager", trust_remote_code=config.trust_remote_code
            )
    except ValueError as error:
        raise UserError(
            f"{who}: transformers has no {model_class.__name__} of the type {found.model_type!r}; "
            f"use another model."
        ) from error


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_by_factors(config: Config, student: nn.Module) -> int:
    """Parameters that a factorised student has less; its budget is a share of these matrices."""
    settings = config.student.low_rank
    if settings is None:
        return 0
    whole = sum(p * q for p, q in map(sizes, targets(student, settings).values()))
    return round((1 - settings.keep) * whole)


def size_of(config: Config, found: PreTrainedConfig, model: nn.Module) -> Size:
    known, roles = shape(found.to_dict()), matrix_sizes(layer_modules(model)[0])
    inner = next((v for name in FEED_FORWARD if (v := getattr(found, name, None))), None)
    inner = inner or (roles["up"][1] if "up" in roles else 4 * found.hidden_size)
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    head = model.get_output_embeddings() if tasks.load(config.task.kind).vocabulary else None
    return Size(
        parameters=count(model),
        largest=max(own),
        layers=found.num_hidden_layers,
        hidden=found.hidden_size,
        attention=known.attention,
        key=known.key,
        heads=found.num_attention_heads,
        inner=inner,
        gated="gate" in roles,
        outputs=found.vocab_size if head is not None else 0,
        multiplied=count(model) - looked_up(model),
    )


def looked_up(model: nn.Module) -> int:
    """Parameters of tables that are no output head too."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return sum(table.numel() for table in tables if table is not head)


def trace_of(found: PreTrainedConfig, model: nn.Module, needs: list[Needs]) -> tuple[int, int]:
    """Numbers per token, and per sample, that the largest trace keeps, without logits."""
    known, roles = shape(found.to_dict()), matrix_sizes(layer_modules(model)[0])

    def matrix(role: str, of: str) -> int:
        if role not in roles or of == "apply":
            return 0
        return roles[role][0 if of == "input" else 1]

    def numbers(need: Needs) -> tuple[int, int]:
        reads = [read for layer in need.layers.values() for read in layer]
        vectors = [read for read in [*reads, *need.model] if read in ("cls", "mean", "last")]
        tokens = sum(known.width(read) for read in reads if read not in vectors)
        tokens += known.hidden if "embedding" in need.model else 0
        tokens += sum(matrix(*read) for layer in need.matrices.values() for read in layer)
        return tokens, known.hidden * len(vectors)

    per_token, per_sample = zip(*map(numbers, needs), strict=True)
    return max(per_token), max(per_sample)


def choices(config: Config) -> list[Choice]:
    """Every ZeRO stage of both, with the run's own offload and checkpointing."""
    checkpointing = config.student.activation_checkpointing != "none"
    return [
        Choice(teacher, student, teacher == 3 and config.teacher.offload == "cpu", checkpointing)
        for teacher, student in product((0, 3), (0, 1, 2, 3))
    ]


def estimate(
    config: Config, models: Models, cluster: Cluster, choice: Choice, micro_batch: int
) -> Plan:
    """The peak is in the teacher's forward pass or in the student's backward; what either has at
    once is added to what both hold."""
    world, accum, length = cluster.world, config.batch.grad_accum, config.data.max_length
    w, student = WIDTHS[config.student.dtype], models.student
    student_offload = config.student.offload == "cpu" and choice.student_zero > 0
    ours = footprint.trained(
        student.parameters, choice.student_zero, w, world, accum, student_offload
    )
    tokens = micro_batch * length
    held = w * tokens * models.student_trace[0] if choice.checkpointing else 0
    work = 4 * tokens * models.compared
    eager = config.student.attention == "eager"
    backward = held + footprint.activations(
        student, micro_batch, length, w, choice.checkpointing, eager, config.student.dropout
    )
    logits = footprint.logits(student, micro_batch, length, w, models.reads_head)
    live = footprint.gathered_student(student, choice.student_zero, w)
    zero = config.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", footprint.BUCKET))
    live += footprint.buffers(student.parameters, choice.student_zero, w, world, bucket)
    theirs, traces, first, teacher_wire = footprint.States(0, 0, 0, 0), 0.0, 0.0, 0.0
    if models.teacher is not None:
        t, teacher = WIDTHS[config.teacher.dtype], models.teacher
        theirs = footprint.frozen(
            teacher.parameters, choice.teacher_zero, t, world, choice.teacher_offload
        )
        # Where losses compare samples of a whole step, its traces are all there at once.
        kept = accum if models.gathered else 1
        per_sample = length * models.teacher_trace[0] + models.teacher_trace[1]
        # What enters a head over a vocabulary, in the place of its logits.
        per_sample += length * teacher.hidden if teacher.outputs and models.reads_head else 0
        traces = kept * micro_batch * t * per_sample
        traces += 4 * models.gathered * micro_batch * accum * world
        eager = config.teacher.attention == "eager"
        first = footprint.forward_only(teacher, micro_batch, length, t, eager)
        first += footprint.gathered_teacher(teacher, choice.teacher_zero, t)
        teacher_wire = footprint.teacher_wire(
            teacher.parameters, choice.teacher_zero, t, world, accum
        )
    extra = bool(models.gathered) and accum > 1
    wire = Wire(
        teacher_wire,
        footprint.student_wire(student.parameters, choice.student_zero, w, world, accum, extra),
        footprint.sample_wire(models.gathered, micro_batch, world, accum),
    )
    return Plan(
        choice,
        micro_batch,
        theirs.weights,
        ours.weights,
        ours.gradients,
        ours.optimizer,
        backward,
        traces + work,
        logits,
        # Beyond what the student's pass needs anyway.
        live + max(0.0, first - backward - logits - live),
        theirs.host + ours.host,
        wire,
        footprint.step_flops(models.teacher, student, accum * tokens, length, choice.checkpointing),
    )


def room(cluster: Cluster) -> float:
    return (cluster.gpu_memory - cluster.reserve) * GIB


def largest_micro_batch(config: Config, models: Models, cluster: Cluster, choice: Choice) -> int:
    """0 where not even one sample fits."""

    def fits(samples: int) -> bool:
        return estimate(config, models, cluster, choice, samples).total <= room(cluster)

    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def recommended(config: Config, models: Models, cluster: Cluster) -> Plan | None:
    """Of the choices in which the run's micro-batch fits, that with the least traffic, then the
    least memory. Where none does, first checkpointing, then the teacher's offload, then both are
    tried; at last smaller micro-batches, more of them, under the choice that takes the largest.
    None where not even one sample fits."""
    tried: list[Choice] = []
    for offload, checkpointing in product((False, True), (False, True)):
        more = [
            replace(
                choice,
                teacher_offload=choice.teacher_offload or (offload and choice.teacher_zero == 3),
                checkpointing=choice.checkpointing or checkpointing,
            )
            for choice in choices(config)
        ]
        plans = [estimate(config, models, cluster, c, config.batch.micro_batch) for c in more]
        if fitting := [plan for plan in plans if plan.total <= room(cluster)]:
            return min(fitting, key=lambda plan: (plan.wire.total, plan.total))
        tried += more
    most = {choice: largest_micro_batch(config, models, cluster, choice) for choice in tried}
    choice = max(most, key=lambda choice: most[choice])
    if most[choice] == 0:
        return None
    # As many equal parts of the micro-batch as there must be; the global batch stays what it is.
    given = config.batch.micro_batch
    parts = next(n for n in range(1, given + 1) if given % n == 0 and given // n <= most[choice])
    smaller = with_parts(config, parts)
    return estimate(smaller, models, cluster, choice, smaller.batch.micro_batch)


def with_parts(config: Config, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.batch.micro_batch //= parts
    config.batch.grad_accum *= parts
    return config


def with_choice(config: Config, plan: Plan, cluster: Cluster) -> Config:
    config = with_parts(config, config.batch.micro_batch // plan.micro_batch)
    choice = plan.choice
    config.teacher.zero_stage, config.student.zero_stage = choice.teacher_zero, choice.student_zero
    config.teacher.offload = "cpu" if choice.teacher_offload else "none"
    if choice.student_zero == 0:
        config.student.offload = "none"
    checkpointing = "non_reentrant" if choice.checkpointing else "none"
    config.student.activation_checkpointing = checkpointing
    config.launch.processes = cluster.gpus_per_node
    configs.check(config)
    return config


PARTS = ("teacher_weights", "student_weights", "gradients", "optimizer", "activations", "traces")
PARTS += ("logits", "buffers", "total", "host")


def told(plan: Plan, largest: int, cluster: Cluster) -> dict[str, Any]:
    """In GiB."""
    found: dict[str, Any] = asdict(plan.choice) | {"micro_batch": plan.micro_batch}
    found |= {f"{name}_gib": getattr(plan, name) / GIB for name in PARTS}
    found["fits"] = plan.total <= room(cluster)
    found["largest_micro_batch"] = largest
    found["wire_gib"] = asdict(plan.wire) | {"total": plan.wire.total}
    found["wire_gib"] = {key: size / GIB for key, size in found["wire_gib"].items()}
    if cluster.bandwidth:
        found["wire_s"] = plan.wire.total / (cluster.bandwidth * 1e9)
    found["tflop"] = plan.flops / 1e12
    if cluster.tflops:
        found["compute_s"] = found["tflop"] / cluster.tflops
    return found


def table(found: dict[str, Any], config: Config, cluster: Cluster) -> str:
    heads = ["ZeRO t/s", *(name.replace("_weights", " w") for name in PARTS), "wire", "largest"]
    heads = [head.replace("gradients", "grads").replace("activations", "activ.") for head in heads]
    rows = []
    for plan in found["choices"]:
        sizes_of_plan = [plan[f"{name}_gib"] for name in PARTS] + [plan["wire_gib"]["total"]]
        name = f"{plan['teacher_zero']} / {plan['student_zero']}{'' if plan['fits'] else ' !'}"
        rows.append([name, *(f"{size:.2f}" for size in sizes_of_plan)])
        rows[-1].append(str(plan["largest_micro_batch"]))
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, "
        f"{cluster.reserve:g} of them in reserve. Teacher {found['teacher_parameters']:,} "
        f"parameters (as deep as it is read), student {found['student_parameters']:,}.",
        f"GiB per process at micro-batch {config.batch.micro_batch} x {config.data.max_length} "
        f"tokens; wire: sent per process and step; ! does not fit.",
        "",
        *("".join(f"{cell:>11}" for cell in row) for row in [heads, *rows]),
        "",
    ]
    best = found["recommended"]
    if best is None:
        return "\n".join([*lines, "Nothing fits: use more GPUs, or shorter texts."])
    words = [f"teacher.zero_stage={best['teacher_zero']}"]
    words += [f"student.zero_stage={best['student_zero']}"]
    words += ["teacher.offload=cpu"] if best["teacher_offload"] else []
    words += ["student.activation_checkpointing=non_reentrant"] if best["checkpointing"] else []
    parts = config.batch.micro_batch // best["micro_batch"]
    words += [f"batch.micro_batch={best['micro_batch']}"]
    words += [f"batch.grad_accum={config.batch.grad_accum * parts}"]
    seconds = f", {best['wire_s']:.2f} s on the wire" if "wire_s" in best else ""
    if "compute_s" in best:
        seconds += f", {best['compute_s']:.2f} s of arithmetic"
    lines.append(f"Recommended ({best['total_gib']:.1f} GiB{seconds}): {' '.join(words)}")
    return "\n".join(lines)
