"""Students whose matrices are factorised: which and how far, the start by SVD, loading, saving and
merging back.

Such a model is a Hugging Face folder whose config.json holds the ranks (`mlkd_low_rank`, by the
matrix's name inside the base model) and whose weights are `model.low_rank.safetensors`. Under
the usual name transformers' own loader would take them and start those matrices at random.
"""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mlkd_dist.config import LowRankConfig, UserError, resolve_path
from mlkd_dist.models.linears import (
    LowRankEmbedding,
    dense,
    layer_matrices,
    low_rank,
    matrix_sizes,
    sizes,
)
from mlkd_dist.models.roles import FAMILIES, NAMES, ROLES
from mlkd_dist.models.tap import layer_modules

KEY = "mlkd_low_rank"
VARIANT = "low_rank"
WHERE = "student.low_rank"


def ranks_of(config: PreTrainedConfig) -> dict[str, int]:
    """Matrix -> rank; empty for an ordinary model."""
    return getattr(config, KEY, None) or {}


def targets(model: PreTrainedModel, settings: LowRankConfig) -> dict[str, nn.Module]:
    """What is to be factorised, by its name in the base model. UserError where the model has no
    such matrix. Weights are not looked at."""
    base, layers = model.base_model, {id(layer) for layer in layer_modules(model)}
    wanted, found = set(settings.matrices or ROLES), {}
    for name, layer in base.named_modules():
        if id(layer) not in layers:
            continue
        check_roles(model, layer, settings)
        for inner, matrix in layer_matrices(layer).items():
            roles = set(NAMES[inner])
            if roles & wanted and not roles <= wanted:
                raise UserError(
                    f"{WHERE}.matrices: {type(model).__name__} computes {', '.join(NAMES[inner])} "
                    f"in one matrix ({inner}); name all of them or none."
                )
            if roles <= wanted:
                found[f"{name}.{inner}"] = matrix
    if settings.embeddings:
        found |= embedding(model)
    return found


def check_roles(model: PreTrainedModel, layer: nn.Module, settings: LowRankConfig) -> None:
    there = list(matrix_sizes(layer))
    unknown = [role for role in ROLES if role not in there and role != "gate"]
    if unknown:
        raise UserError(
            f"{WHERE}: the layers of {type(model).__name__} have no {', '.join(unknown)} that is "
            f"known by name; use a teacher like {FAMILIES}, or student.from_teacher."
        )
    for role in settings.matrices or []:
        if role not in there:
            raise UserError(
                f"{WHERE}.matrices: {role!r} is no matrix of {type(model).__name__}; it has "
                f"{', '.join(there)}."
            )


def embedding(model: PreTrainedModel) -> dict[str, nn.Module]:
    table = model.get_input_embeddings()
    holders = [p for _, p in model.named_parameters(remove_duplicate=False) if p is table.weight]
    if type(table) is not nn.Embedding or len(holders) > 1:
        shared = "shares its word embeddings with its output head"
        raise UserError(
            f"{WHERE}.embeddings: {type(model).__name__} "
            f"{shared if len(holders) > 1 else 'has word embeddings of its own kind'}, so they "
            f"cannot be factorised; use false."
        )
    return {n: module for n, module in model.base_model.named_modules() if module is table}


def check_plan(model: PreTrainedModel, settings: LowRankConfig) -> dict[str, nn.Module]:
    """The targets; UserError also where the budget leaves a matrix without any rank."""
    chosen = targets(model, settings)
    shapes = {name: sizes(matrix) for name, matrix in chosen.items()}
    if settings.budget == "ratio":
        name, least = max(
            ((name, (p + q) / (p * q)) for name, (p, q) in shapes.items()), key=lambda n: n[1]
        )
    else:
        name = "some matrix"
        least = sum(p + q for p, q in shapes.values()) / sum(p * q for p, q in shapes.values())
    if settings.keep < least:
        raise UserError(
            f"{WHERE}.keep: {settings.keep} leaves {name} no rank at all; use "
            f"{math.ceil(least * 1e4) / 1e4} or more."
        )
    return chosen


def equal_ranks(shapes: dict[str, tuple[int, int]], keep: float) -> dict[str, int]:
    """The same share of each p x q matrix: rank r costs r (p + q) of its p q numbers."""
    return {name: int(keep * p * q / (p + q)) for name, (p, q) in shapes.items()}


def energy_ranks(
    shapes: dict[str, tuple[int, int]], values: dict[str, Tensor], keep: float
) -> dict[str, int]:
    """The singular values of all matrices compete for the same total of numbers, by the share of
    their own matrix's energy (sum of squares) per number. A matrix whose next rank would cost as
    much as it has stays dense and is left out of the result."""
    spent = {name: p + q for name, (p, q) in shapes.items()}
    ranks = dict.fromkeys(shapes, 1)
    left = keep * sum(p * q for p, q in shapes.values()) - sum(spent.values())
    offers = []
    for name, (p, q) in shapes.items():
        energy = values[name].double().square()
        shares = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        offers += [(share / (p + q), name) for share in shares[1:].tolist()]
    closed: set[str] = set()
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        p, q = shapes[name]
        cost = min(p + q, p * q - spent[name])
        if name in closed or cost > left:
            closed.add(name)
            continue
        left, spent[name], ranks[name] = left - cost, spent[name] + cost, ranks[name] + 1
        if spent[name] == p * q:
            closed.add(name)
    return {
        name: rank
        for name, rank in ranks.items()
        if spent[name] < shapes[name][0] * shapes[name][1]
    }


def plan(model: PreTrainedModel, settings: LowRankConfig) -> dict[str, int]:
    """Matrix -> rank, for a dense model with its weights."""
    chosen = check_plan(model, settings)
    shapes = {name: sizes(matrix) for name, matrix in chosen.items()}
    if settings.budget == "ratio":
        return equal_ranks(shapes, settings.keep)
    values = {name: torch.linalg.svdvals(weight_of(matrix)) for name, matrix in chosen.items()}
    return energy_ranks(shapes, values, settings.keep)


def weight_of(matrix: nn.Module) -> Tensor:
    """Outputs first, as a Linear has it; of an Embedding, tokens first. On the GPU where there is
    one, in fp32 or wider."""
    weight = matrix.weight.detach().to("cuda" if torch.cuda.is_available() else "cpu")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T if isinstance(matrix, Conv1D) else weight


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # [p, q] -> [p, r], [r, q]
    """U sqrt(S) and sqrt(S) V^t of the largest singular values: the best approximation of that
    rank, with both factors of the same size (Eckart, Young 1936)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * v[:rank]


@torch.no_grad()
def factorise(model: PreTrainedModel, ranks: dict[str, int]) -> None:
    """In the place of each matrix, its best approximation of that rank; biases stay."""
    base = model.base_model
    for name, rank in ranks.items():
        matrix = base.get_submodule(name)
        left, right = factors(weight_of(matrix), rank)
        made = low_rank(matrix, rank).to(matrix.weight.dtype)
        if isinstance(made, LowRankEmbedding):
            first, second = left, right.T
        else:
            first, second = right, left
        made.first.weight.copy_(first)
        made.second.weight.copy_(second)
        if getattr(matrix, "bias", None) is not None:
            made.second.bias.copy_(matrix.bias)
        base.set_submodule(name, made)
    setattr(model.config, KEY, dict(ranks))


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with ordinary matrices, where some are factorised."""
    base = model.base_model
    for name in ranks_of(model.config):
        base.set_submodule(name, dense(base.get_submodule(name)))
    if ranks_of(model.config):
        delattr(model.config, KEY)
        model.__class__ = getattr(model, "plain_class", type(model))
    return model


def loadable(model_class: Any, config: PreTrainedConfig, trust: bool = False) -> tuple[Any, dict]:
    """What `from_pretrained` is to be called on for a folder of this config, and what it takes
    beside. The factors must be there before the weights are read, and before ZeRO-3 shards them,
    so they are put in place by the constructor."""
    if not ranks_of(config):
        return model_class, {}
    plain = model_class
    if not hasattr(plain, "base_model_prefix"):
        # An Auto class; which one it stands for is seen from the model that it makes.
        with torch.device("meta"):
            plain = type(model_class.from_config(config, trust_remote_code=trust))

    def start(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **named: Any) -> None:
        plain.__init__(self, config, *args, **named)
        put_factors(self, ranks_of(config))

    # Named as the plain one: the name is written into config.json as the architecture.
    own = {"__init__": start, "__module__": plain.__module__, "plain_class": plain}
    return type(plain.__name__, (plain,), own), {"variant": VARIANT}


def put_factors(model: PreTrainedModel, ranks: dict[str, int]) -> None:
    base = model.base_model
    there = {name for name, _ in base.named_modules()}
    for name, rank in ranks.items():
        # A model that is loaded to a part of its depth lacks the upper layers.
        if name in there:
            base.set_submodule(name, low_rank(base.get_submodule(name), rank))


def save(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """`model.save_pretrained`, with its weights under the name that only `loadable` finds where
    they are factors. `weights`: instead of the model's own, which may be sharded."""
    factorised = bool(ranks_of(model.config))
    variant = {"variant": VARIANT} if factorised else {}
    model.save_pretrained(folder, state_dict=weights, **variant)
    if factorised:
        (folder / "README.md").write_text(HOW_TO_LOAD)


HOW_TO_LOAD = """\
This student is stored in factors of its matrices. Load it with `mlkd_dist.load_student(folder)`, or
merge them into an ordinary Hugging Face folder with `mlkd export RUN OUT --dense`.
"""


def load_student(
    path: str | Path, model_class: Any = None, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """A model folder, of factors or ordinary, as a model of transformers in eval mode; of the class
    that its config.json names, or `model_class`. UserError where it cannot be loaded whole."""
    config = AutoConfig.from_pretrained(resolve_path(str(path)))
    if model_class is None:
        name = (config.architectures or ["AutoModel"])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise UserError(
                f"model {str(path)!r}: transformers has no {name}, which its config.json names; "
                f"give the class to load it as (model_class)."
            )
    source, more = loadable(model_class, config)
    model, info = source.from_pretrained(
        resolve_path(str(path)), config=config, dtype=dtype, output_loading_info=True, **more
    )
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"model {str(path)!r} has no weights for {missing[0]} ({len(missing)} missing in all); "
            f"its config.json names {model_class.__name__}."
        )
    return model.eval()
