"""Reading Hugging Face models: config, tokenizer and weights, whole or cut to fewer layers."""

import copy
from pickle import UnpicklingError
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mlkd_dist.config import UserError, resolve_path
from mlkd_dist.engine import DTYPES, sharded_loading
from mlkd_dist.low_rank import loadable
from mlkd_dist.models.tap import TAP, check_readable


def quiet() -> None:
    """transformers reports on each load what we check ourselves."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def read_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {path!r}: its config cannot be read: {first_line(error)}"
        ) from error


def read_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            resolve_path(path), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model {path!r}: its tokenizer cannot be read: {first_line(error)}"
        ) from error


def lacks_head(config: PreTrainedConfig, model_class: Any) -> bool:
    """Whether the folder of this config holds a model without the head that `model_class` has, as
    far as the config says what it holds."""
    head = model_class.__name__.removeprefix("AutoModel")
    return not any(name.endswith(head) for name in config.architectures or [head])


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def refuse_other_tokenizer(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_path: str,
    student_path: str,
) -> None:
    """Both models see the same token ids, so these must mean the same to both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    if different:
        shown = ", ".join(repr(token) for token in different[:3])
        raise UserError(
            f"teacher {teacher_path!r} and student {student_path!r} have different tokenizers: "
            f"{len(different)} tokens "
            f"differ, among them {shown}; use a student with the teacher's tokenizer, or "
            f"student.from_teacher."
        )
    give_all(student, teacher)
    sample = "The same text, split & marked the same way: naïve #42!"
    for texts in ((sample,), (sample, "Beside it another.")):
        ours, theirs = student(*texts), teacher(*texts)
        if any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
            raise UserError(
                f"teacher {teacher_path!r} and student {student_path!r} have the same vocabulary "
                "but split or mark text differently (lower case, special tokens, or token types); "
                "use a student with the teacher's tokenizer."
            )


def give_all(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Has the student's tokenizer give what either model takes: BERT wants the token types of which
    DistilBERT knows nothing."""
    names = [*student.model_input_names, *teacher.model_input_names]
    student.model_input_names = list(dict.fromkeys(names))


def cut_layers(config: PreTrainedConfig, picks: list[int]) -> PreTrainedConfig:
    """A copy of the config for a model of these layers only, with every per-layer list of it cut
    the same way."""
    config = copy.deepcopy(config)
    layers = config.num_hidden_layers
    per_layer = {
        name: [value[i] for i in picks]
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == layers and not name.startswith("_")
    }
    config.num_hidden_layers = len(picks)
    for name, value in per_layer.items():
        setattr(config, name, value)
    return config


def load_model(
    model_class: Any,
    path: str,
    *,
    config: PreTrainedConfig,
    dtype: str,
    attention: str,
    zero_stage: int = 0,
    ds_config: dict[str, Any] | None = None,
    shard_group: Any = None,
    offload_dir: str | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """With the tap in place, and sharded while loading at ZeRO 3; with `offload_dir` the shares
    rest in a file there. Weights that `path` lacks are refused, but for a head that is to be
    trained (`new_head`) and a pooler, which no loss reads. Without `weights` all is checked and the
    model stays on the meta device."""
    if getattr(config, "attn_logit_softcapping", None) and attention != "eager":
        raise UserError(
            f"model {path!r} caps its attention scores, which {attention} leaves out; set "
            f"attention: eager."
        )
    source, more = loadable(model_class, config, trust_remote_code)
    with sharded_loading(zero_stage, ds_config or {}, shard_group, offload_dir):
        try:
            model, info = source.from_pretrained(
                resolve_path(path),
                config=copy.deepcopy(config),
                dtype=DTYPES[dtype],
                attn_implementation=TAP + attention,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                device_map=None if weights else "meta",
                ignore_mismatched_sizes=not weights,
                **more,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(f"model {path!r} cannot be loaded: {first_line(error)}") from error
        except UnpicklingError as error:
            raise UserError(
                f"model {path!r} cannot be loaded: its weights are a pickle of more than tensors, "
                f"which may run code; use one that is saved as safetensors."
            ) from error
    try:
        check_readable(model, path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if info["mismatched_keys"]:
        name, there, wanted = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"model {path!r} has {name} of the shape {list(there)} where {list(wanted)} is needed; "
            f"use a model of as many classes as the data has (task.labels)."
        )
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    prefix = model.base_model_prefix + "."
    inside = [name for name in missing if model_class is AutoModel or name.startswith(prefix)]
    if inside or (missing and not new_head):
        raise UserError(
            f"model {path!r} has no weights for {missing[0]} ({len(missing)} missing in all); use "
            f"a model trained for "
            "this task, or make one with teacher.finetune."
        )
    return model


def parameter_count(model: PreTrainedModel) -> int:
    """Each shared weight once; under ZeRO-3 the whole, not this process's part."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
