"""What of a run's models its memory, traffic and arithmetic depend on, from config files alone:
models are built on the meta device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.low_rank import targets
from mlkd_dist.models.linears import matrix_sizes, sizes
from mlkd_dist.models.model import cut_layers, read_config
from mlkd_dist.models.tap import layer_modules
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.planning.footprint import Size
from mlkd_dist.processes.world import World
from mlkd_dist.rules.shapes import refuse_type, shape
from mlkd_dist.student import FEED_FORWARD, starting_config
from mlkd_dist.trace import Needs


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


def models_of(config: Config) -> Models:
    trust = config.trust_remote_code
    teacher = read_config(config.teacher.path, trust) if config.teacher.path else None
    student = starting_config(config)
    for key, found in (("teacher.path", teacher), ("student.path", student)):
        if found is not None:
            refuse_type(key, found.model_type)
    objectives = [objective(config, index, student, teacher) for index in range(len(config.stages))]
    ours = built(config, student, tasks.load(config.task.kind).model_class, "student")
    projections = max(count(o.projections()) for o in objectives)
    parameters = count(ours) + projections - saved_by_factors(config, ours)
    student_size = replace(size_of(config, student, ours), parameters=parameters)
    student_trace = trace_of(student, ours, [o.needs(0) for o in objectives])
    reading = [o for o in objectives if o.reads_teacher]
    if not reading:
        return Models(None, student_size, (0, 0), student_trace, 0, 0, reads_head(objectives))
    deepest = deepest_needs(reading)
    theirs = built(config, cut_to(teacher, deepest), teacher_class(config, deepest), "teacher")
    teacher_trace = trace_of(teacher, theirs, [o.needs(1) for o in reading])
    # What the teacher said before is read from files, a batch of it at a time.
    live = config.teacher.cache is None
    return Models(
        size_of(config, cut_to(teacher, deepest), theirs) if live else None,
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
