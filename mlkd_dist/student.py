"""The student: cut out of a teacher into a folder, its matrices factorised where that is asked for,
and the module that trains it together with its projections."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mlkd_dist.config import Config, FromTeacherConfig, StudentConfig, UserError
from mlkd_dist.layer_map import layer_pairs
from mlkd_dist.low_rank import factorise, loadable, merge, plan, save
from mlkd_dist.models.model import cut_layers, load_model, read_config, read_tokenizer, resolve_path
from mlkd_dist.models.roles import BY_HEAD
from mlkd_dist.models.tap import capture, layer_modules
from mlkd_dist.objective import Objective, Peers
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Needs, Trace

# The width of the feed-forward block goes by many names.
FEED_FORWARD = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")


def make_student(
    model_class: Any, teacher_path: str, settings: StudentConfig, out: Path, trust: bool = False
) -> None:
    """Write a student folder: some layers of the teacher, its heads regrouped or its width cut, the
    rest copied; then factorised."""
    config = read_config(teacher_path, trust)
    cut = settings.from_teacher or FromTeacherConfig()
    source, more = loadable(model_class, config, trust)
    teacher = merge(
        source.from_pretrained(resolve_path(teacher_path), trust_remote_code=trust, **more)
    )
    picks = picked_layers(cut.layers, config.num_hidden_layers)
    student_config = cut_config(teacher.config, cut)
    # Weights that no teacher weight matches start as the model's own initialiser makes them.
    torch.manual_seed(0)
    student = model_class.from_config(student_config, dtype=teacher.dtype, trust_remote_code=trust)
    copy_weights(teacher, student, picks)
    if settings.low_rank is not None:
        factorise(student, plan(student, settings.low_rank))
    save(student, out)
    read_tokenizer(teacher_path, trust).save_pretrained(out)


def cut_config(config: PreTrainedConfig, cut: FromTeacherConfig) -> PreTrainedConfig:
    """That of the student."""
    picks = picked_layers(cut.layers, config.num_hidden_layers)
    found = cut_width(cut_heads(cut_layers(config, picks), cut.heads), cut.hidden)
    rotary, wide = getattr(found, "rope_parameters", None), head_dim(found)
    turned = int(wide * rotary.get("partial_rotary_factor", 1)) if rotary else 0
    if wide != head_dim(config) and turned % 2:
        raise UserError(
            f"student.from_teacher: heads would be {wide} wide, and positions turn {turned} of "
            f"these in pairs; use another width or number of heads."
        )
    return found


def starting_config(config: Config) -> PreTrainedConfig:
    """Of the student, before it is cut."""
    student, trust = config.student, config.trust_remote_code
    if student.path is not None:
        return read_config(student.path, trust)
    teacher = read_config(config.teacher.path, trust)
    return cut_config(teacher, student.from_teacher or FromTeacherConfig())


def picked_layers(layers: int | list[int] | None, teacher_layers: int) -> list[int]:
    """A number of layers is spread as the uniform layer map is, so that a layer starts as the one
    it learns from."""
    if isinstance(layers, list):
        return layers
    return [
        teacher for _, teacher in layer_pairs("uniform", layers or teacher_layers, teacher_layers)
    ]


def cut_heads(config: PreTrainedConfig, heads: int | None) -> PreTrainedConfig:
    """Regroup the same columns into another number of heads. Key and value heads keep their share
    of the heads."""
    before = config.num_attention_heads
    if heads is None or heads == before:
        return config
    kv_before = getattr(config, "num_key_value_heads", None) or before
    width, kv_heads = before * head_dim(config), kv_before * heads // before
    if width % heads or (kv_before != before and (kv_heads == 0 or kv_before * heads % before)):
        raise UserError(
            f"student.from_teacher.heads: {heads} does not fit a teacher of {before} heads and "
            f"{kv_before} key heads "
            f"over a width of {width}; use a number that divides {width} and keeps whole key heads."
        )
    config.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = kv_heads
    if getattr(config, "head_dim", None):
        config.head_dim = width // heads
    return config


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cut_width(config: PreTrainedConfig, hidden: int | None) -> PreTrainedConfig:
    """A narrower model: the hidden size, the feed-forward width in proportion, the heads' width
    with them."""
    before = config.hidden_size
    if hidden is None or hidden == before:
        return config
    for name in FEED_FORWARD:
        if getattr(config, name, None):
            setattr(config, name, max(1, round(getattr(config, name) * hidden / before)))
    if getattr(config, "head_dim", None):
        config.head_dim = max(2, round(config.head_dim * hidden / before))
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = hidden
    config.hidden_size = hidden
    return config


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, picks: list[int]) -> None:
    """Each student weight from the teacher's of the same name, layer k from layer picks[k], leading
    coordinates."""
    names = layer_names(student), layer_names(teacher)
    source = teacher.state_dict()
    sizes = dimension_pairs(teacher.config, student.config)
    for name, target in student.state_dict().items():
        theirs = teacher_name(name, *names, picks)
        found = source.get(theirs)
        if found is None:
            if theirs.startswith(tuple(names[1])):
                raise UserError(
                    f"student.from_teacher.layers: the student would have {name}, for which its "
                    f"teacher has no {theirs}, since its layers differ; list layers so that each "
                    f"becomes one of its own kind, such as [0, ...]."
                )
            continue
        if name.removesuffix(".weight").removesuffix(".bias").endswith(BY_HEAD):
            heads = (m.config.num_attention_heads for m in (teacher, student))
            found = regrouped(found, *heads)
        for wide, narrow in zip(found.shape, target.shape, strict=True):
            if wide != narrow and (wide, narrow) not in sizes:
                raise UserError(
                    f"student.from_teacher.hidden: {name} joins several matrices in one ({wide} to "
                    f"{narrow}) and cannot be narrowed; leave hidden empty for this family."
                )
        # A norm inside each head (Qwen3) meets wider heads where fewer of them share the width.
        repeats = [
            -(-narrow // wide) for wide, narrow in zip(found.shape, target.shape, strict=True)
        ]
        found = found.repeat(repeats) if max(repeats, default=1) > 1 else found
        target.copy_(found[tuple(slice(0, size) for size in target.shape)])


def regrouped(joined: Tensor, teacher_heads: int, student_heads: int) -> Tensor:
    """Rows of queries, keys and values that alternate head by head, for another number of heads."""
    apart = joined.unflatten(0, (teacher_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    return apart.unflatten(1, (student_heads, -1)).transpose(0, 1).flatten(0, 2)


def layer_names(model: PreTrainedModel) -> list[str]:
    """Module names of the layers; a model that shares their weights has fewer than it runs."""
    layers = {id(layer) for layer in layer_modules(model)}
    return [name for name, module in model.named_modules() if id(module) in layers]


def teacher_name(
    name: str, student_layers: list[str], teacher_layers: list[str], picks: list[int]
) -> str:
    if len(student_layers) != len(picks):
        return name
    for k, layer in enumerate(student_layers):
        if name.startswith(layer + "."):
            return teacher_layers[picks[k]] + name.removeprefix(layer)
    return name


def dimension_pairs(teacher: PreTrainedConfig, student: PreTrainedConfig) -> set[tuple[int, int]]:
    """Sizes (teacher, student) that a narrower model may differ in."""

    def sizes(config: PreTrainedConfig) -> list[int]:
        width = head_dim(config)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        inner = next(
            (v for name in FEED_FORWARD if (v := getattr(config, name, None))),
            4 * config.hidden_size,
        )
        return [
            config.hidden_size,
            config.num_attention_heads * width,
            kv_heads * width,
            width,
            inner,
        ]

    return set(zip(sizes(teacher), sizes(student), strict=True))


def load_student(
    model_class: Any,
    path: str,
    settings: StudentConfig,
    ds_config: dict[str, Any],
    labels: int | None,
    trust: bool,
) -> PreTrainedModel:
    """For training; `labels` gives the model a new head of so many classes where it has none."""
    config = read_config(path, trust)
    if labels is not None:
        config.num_labels = labels
    model = load_model(
        model_class,
        path,
        config=config,
        dtype=settings.dtype,
        attention=settings.attention,
        zero_stage=settings.zero_stage,
        ds_config=ds_config,
        new_head=labels is not None,
        trust_remote_code=trust,
    )
    if not settings.dropout:
        turn_off_dropout(model)
    if settings.activation_checkpointing == "non_reentrant":
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"student.activation_checkpointing: {type(model).__name__} does not support it; "
                f"use none."
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def turn_off_dropout(model: PreTrainedModel) -> None:
    """In the modules only: the config, which is exported, keeps what the model came with. Where
    their forward reads a share from it, they get a copy."""
    config = copy.deepcopy(model.config)
    without_dropout(config)
    for module in model.modules():
        without_dropout(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if vars(module).get("config") is model.config and not isinstance(module, PreTrainedModel):
            module.config = config


def without_dropout(holder: object) -> None:
    """Every share to drop that it holds: `dropout`, `attention_dropout`, `layerdrop`, ..."""
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


class Student(nn.Module):
    """What the student's engine wraps: the model, its projections, and the loss computed inside
    forward, so that one engine shards and reduces all that trains and ZeRO-3 sees every weight
    used."""

    def __init__(self, model: PreTrainedModel, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective
        self.projections = objective.projections().to(model.dtype)
        objective.reach.into(model.parameters())

    def forward(
        self,
        batch: Batch,
        seen: Trace | None = None,
        rows: dict[str, Tensor] | None = None,
        peers: Peers | None = None,
        index: int = 0,
        needs: Needs | None = None,
    ) -> Any:
        """The loss of this micro-batch and its share of each term; without `rows`, its sample
        vectors; with `needs`, no more than that of its trace."""
        if needs is not None:
            return capture(self.model, self.model, batch.inputs, needs, batch.labels)
        trace = capture(self.model, self.model, batch.inputs, self.objective.needs(0), batch.labels)
        if rows is None:
            return self.objective.student_vectors(trace, self.projections)
        return self.objective(trace, seen, batch, rows, self.projections, peers, index)
