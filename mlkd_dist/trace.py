"""What a model shows while it runs: the attention tap, the layer hooks, and the Trace they fill."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlkd_dist.models.head import Head, TopKRows, head_of, watched_head
from mlkd_dist.models.linears import Applied, layer_matrices, matrices, matrix_sizes, part
from mlkd_dist.models.roles import NAMES

# What a loss may read. Of a layer: the vectors entering attention (after rotary embedding), its
# result before ("context") and after ("attention_output") the output projection, the layer's
# output, and one vector per sample taken from that. Of the whole model: the input of the first
# layer, one vector per sample of the last hidden state, and the logits; or, where these are many,
# what enters the output head. Of a layer's matrices: see roles.py.
ATTENTION_READS = ("query", "key", "value", "context", "attention_output")
VECTOR_READS = ("cls", "mean", "last")
LAYER_READS = (*ATTENTION_READS, "hidden", *VECTOR_READS)
LOGIT_READS = frozenset({"logits", "head"})
MODEL_READS = ("embedding", *VECTOR_READS, *sorted(LOGIT_READS))

TAP = "mlkd_tap_"


@dataclass
class Matrix:
    """One linear map of a layer, or the part of a joined one that has its own role."""

    input: Tensor | None = None  # [B, L, width in]
    output: Tensor | None = None  # [B, L, width out], with the bias
    apply: Callable[[Tensor], Tensor] | None = None  # the map itself, for another input


@dataclass
class Layer:
    """What one layer shows. `heads` counts query heads; keys and values may be narrower."""

    mask: Tensor  # [B, L] bool, True where a token is real
    heads: int
    query: Tensor | None = None  # [B, L, H*d]
    key: Tensor | None = None  # [B, L, Hkv*d]
    value: Tensor | None = None  # [B, L, Hkv*d]
    context: Tensor | None = None  # [B, L, H*d] attention result before the output projection
    attention_output: Tensor | None = None  # [B, L, D] after the output projection
    hidden: Tensor | None = None  # [B, L, D] output of the layer
    cls: Tensor | None = None  # [B, D] of the output, see sample_vector
    mean: Tensor | None = None  # [B, D]
    last: Tensor | None = None  # [B, D]
    scale: float | None = None  # of the scores <query, key>; None is 1/sqrt(width of a head)
    causal: bool = False  # whether a token attends to none that comes after it
    matrices: dict[str, Matrix] = field(default_factory=dict)  # by role, as in roles.py

    def by_head(self, name: str) -> Tensor:  # -> [B, H, L, d], of keys and values [B, Hkv, L, d]
        width = self.query.shape[-1] // self.heads
        return getattr(self, name).unflatten(-1, (-1, width)).transpose(1, 2)


@dataclass
class Samples:
    """One vector per sample of the global batch."""

    vector: Tensor  # [N, D]
    keep: Tensor  # [N] bool, True where the sample counts
    labels: Tensor | None = (
        None  # [N] class of each sample, -100 where unknown; None for tasks without classes
    )


@dataclass
class Trace:
    """What one forward pass shows; only what was asked for is kept."""

    mask: Tensor  # [B, L] bool, True where a token is real
    heads: int
    embedding: Tensor | None = None  # [B, L, D] what enters the first layer
    layers: dict[int, Layer] = field(default_factory=dict)  # counted from 0, as in Hugging Face
    vectors: dict[str, Tensor] = field(default_factory=dict)  # [B, D] each, by name of VECTOR_READS
    logits: Tensor | None = None  # [B, C], [B, L, V], or of spans [B, 2, L], see logits_of
    head: Head | None = None
    head_input: Tensor | None = None  # [B, L, D] what the head makes the logits of
    top_k: TopKRows | None = None  # [n] in the place of a head, of the tokens that count
    labels: Tensor | None = None  # [B] or [B, L], -100 where ignored

    def layer(self, index: int) -> Layer:
        return self.layers.setdefault(index, Layer(self.mask, self.heads))


def sample_vector(states: Tensor, mask: Tensor, kind: str) -> Tensor:  # [B, L, D], [B, L] -> [B, D]
    """One vector per sample: the state of its first real token (cls), of its last one (last), or
    the mean."""
    if kind == "mean":
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    assert kind in VECTOR_READS, kind
    real = mask.int()
    position = real.argmax(1) if kind == "cls" else real.shape[1] - 1 - real.flip(1).argmax(1)
    return states[torch.arange(len(states), device=states.device), position]


@dataclass(frozen=True)
class Needs:
    """What must be kept of a forward pass."""

    model: frozenset[str] = frozenset()  # of MODEL_READS
    layers: dict[int, frozenset[str]] = field(default_factory=dict)  # layer -> of LAYER_READS
    # layer -> (role, field of Matrix) of its matrices, where it has them
    matrices: dict[int, frozenset[tuple[str, str]]] = field(default_factory=dict)

    def union(self, other: "Needs") -> "Needs":
        return Needs(
            self.model | other.model,
            united(self.layers, other.layers),
            united(self.matrices, other.matrices),
        )

    def depth(self) -> int | None:
        """Layers that must run; None where the top of the model is read, which only its full depth
        gives."""
        if self.model - {"embedding"}:
            return None
        return max([*self.layers, *self.matrices], default=0) + 1


def united(ours: dict[int, frozenset], theirs: dict[int, frozenset]) -> dict[int, frozenset]:
    return {i: ours.get(i, frozenset()) | theirs.get(i, frozenset()) for i in ours.keys() | theirs}


class Recorder:
    """Fills a trace while a model runs. Layers are counted as they are entered, so that shared ones
    count too."""

    def __init__(self, trace: Trace, needs: Needs):
        self.trace, self.needs = trace, needs
        self.index = -1
        self.projects_next = False

    def wanted(self) -> frozenset[str]:
        return self.needs.layers.get(self.index, frozenset())

    def enter_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.index += 1
        if self.index == 0 and "embedding" in self.needs.model:
            self.trace.embedding = args[0] if args else kwargs["hidden_states"]
        if any(of == "apply" for _, of in self.needs.matrices.get(self.index, ())):
            for name, matrix in layer_matrices(layer).items():
                applied = Applied(name, matrix, self.trace.heads)
                self.show_matrix(name, "apply", partial(partial, applied))

    def show_matrix(self, name: str, of: str, found: Callable[[str], Any]) -> None:
        """Keep what is asked for of a matrix: `found` of each of its roles."""
        for role in NAMES[name]:
            if (role, of) in self.needs.matrices.get(self.index, ()):
                matrix = self.trace.layer(self.index).matrices.setdefault(role, Matrix())
                setattr(matrix, of, found(role))

    def leave_matrix(self, name: str, _: nn.Module, args: tuple, output: Tensor) -> None:
        # Some layers fold the batch into the positions on the way.
        given, made = (x.reshape(*self.trace.mask.shape, -1) for x in (args[0], output))
        self.show_matrix(name, "input", lambda role: given)
        self.show_matrix(name, "output", lambda role: part(name, role, made, self.trace.heads))

    def leave_layer(self, _: nn.Module, args: tuple, output: Any) -> None:
        wanted, states = self.wanted(), output[0] if isinstance(output, tuple) else output
        if "hidden" in wanted:
            self.trace.layer(self.index).hidden = states
        for kind in wanted & set(VECTOR_READS):
            vector = sample_vector(states, self.trace.mask, kind)
            setattr(self.trace.layer(self.index), kind, vector)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: Tensor,
        scale: float | None,
        causal: bool,
    ) -> None:
        """query, key, value: [B, H, L, d]; context: [B, L, H, d]."""
        wanted = self.wanted()
        if wanted & set(ATTENTION_READS):
            self.trace.layer(self.index).scale = scale
            self.trace.layer(self.index).causal = causal
        heads_last = {"query": query, "key": key, "value": value}
        found = {
            name: tensor.transpose(1, 2) for name, tensor in heads_last.items() if name in wanted
        }
        if "context" in wanted:
            found["context"] = context
        for name, tensor in found.items():
            setattr(self.trace.layer(self.index), name, tensor.flatten(2))
        self.projects_next = "attention_output" in wanted

    def projection(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        """The first projection that runs after attention is the attention's output projection, in
        every family."""
        if self.projects_next:
            self.trace.layer(self.index).attention_output = output
            self.projects_next = False

    def leave_base(self, _: nn.Module, args: tuple, output: Any) -> None:
        for kind in self.needs.model & set(VECTOR_READS):
            self.trace.vectors[kind] = sample_vector(output[0], self.trace.mask, kind)


# The recorder of the forward pass that is running. Empty in the backward pass, so that layers which
# are computed again there (activation checkpointing) are not recorded twice.
RECORDING: ContextVar[Recorder | None] = ContextVar("recording", default=None)
# [B, L]: which document of its sequence a token belongs to; None where a sequence is one.
DOCUMENTS: ContextVar[Tensor | None] = ContextVar("documents", default=None)


def tapped(inner: str) -> Callable[..., Any]:
    """The attention function `inner` of transformers, watched by whatever recorder is active."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if inner == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[inner]
        context, weights = function(module, query, key, value, mask, **kwargs)
        if recorder := RECORDING.get():
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", False) if causal is None else causal
            recorder.attention(query, key, value, context, kwargs.get("scaling"), causal)
        return context, weights

    return attention


def tapped_mask(inner: str) -> Callable[..., Any]:
    """The mask function `inner` of transformers, without attention across documents. Not left to
    transformers, which finds documents by their positions, but in some families only."""
    function = eager_mask if inner == "eager" else ALL_MASK_ATTENTION_FUNCTIONS[inner]

    def mask(*, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Any:
        if (documents := DOCUMENTS.get()) is not None:
            mask_function = and_masks(mask_function, packed_sequence_mask_function(documents))
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return function(mask_function=mask_function, **kwargs)

    return mask


for inner in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
    AttentionInterface.register(TAP + inner, tapped(inner))
    AttentionMaskInterface.register(TAP + inner, tapped_mask(inner))


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, by the class that transformers itself takes hidden states from."""
    recorded = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("hidden_states")
    kinds = recorded if isinstance(recorded, list | tuple) else [recorded]
    classes = tuple(getattr(kind, "target_class", kind) for kind in kinds if kind is not None)
    return [
        module for module in model.base_model.modules() if classes and isinstance(module, classes)
    ]


def check_readable(model: PreTrainedModel, path: str) -> None:
    """ValueError for a model whose attention or layers cannot be read."""
    if not getattr(model, "_supports_attention_backend", False) or not layer_modules(model):
        raise ValueError(
            f"model {path!r}: {type(model).__name__} does not use transformers' attention "
            f"interface, so nothing inside "
            "it can be read; use a BERT, RoBERTa, ELECTRA, ModernBERT, Llama or another model "
            "that supports it."
        )


def head_count(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_attention_heads


@contextmanager
def recording(model: PreTrainedModel, needs: Needs, trace: Trace) -> Iterator[None]:
    """While this is open, a forward pass of `model` fills `trace`.

    Hooks live for one pass only: they then come after DeepSpeed's own, whose outputs carry the
    gradient hooks of ZeRO-3.
    """
    recorder = Recorder(trace, needs)
    with ExitStack() as stack:
        layers = layer_modules(model)
        in_layers = needs.layers or needs.matrices or "embedding" in needs.model
        for layer in layers if in_layers else []:
            stack.callback(
                layer.register_forward_pre_hook(recorder.enter_layer, with_kwargs=True).remove
            )
            stack.callback(layer.register_forward_hook(recorder.leave_layer).remove)
        if any("attention_output" in reads for reads in needs.layers.values()):
            for _, matrix in matrices(model):
                stack.callback(matrix.register_forward_hook(recorder.projection).remove)
        for layer in layers if needs.matrices else []:
            for name, matrix in layer_matrices(layer).items():
                hook = partial(recorder.leave_matrix, name)
                stack.callback(matrix.register_forward_hook(hook).remove)
        if needs.model & set(VECTOR_READS):
            # With a language model's head OPT goes around its base model to the decoder in it.
            for base in {model.base_model, model.base_model.get_decoder()}:
                stack.callback(base.register_forward_hook(recorder.leave_base).remove)
        token = RECORDING.set(recorder)
        stack.callback(RECORDING.reset, token)
        yield


def logits_of(output: Any, mask: Tensor) -> Tensor:
    """The model's logits; those of a model that finds spans are a distribution over the tokens for
    the start and one for the end, neither of which lies in padding."""
    if "logits" in output:
        return output.logits
    spans = torch.stack([output.start_logits, output.end_logits], 1)
    return spans.masked_fill(~mask.unsqueeze(1), float("-inf"))


def capture(
    run: Callable[..., Any],
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    needs: Needs,
    labels: Tensor | None,
) -> Trace:
    """`run(**inputs)`, where `run` is the model or the engine around it, and what it showed."""
    trace = Trace(inputs["attention_mask"].bool(), head_count(model), labels=labels)
    # A tokenizer may give more than a family takes, such as token types, of which RoBERTa has one
    # only; only decoders know a cache.
    taken = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 2) == 1:
        taken.discard("token_type_ids")
    given = {"use_cache": False, **inputs}
    with ExitStack() as stack:
        watcher = stack.enter_context(watched_head(model)) if "head" in needs.model else None
        stack.enter_context(recording(model, needs, trace))
        stack.callback(DOCUMENTS.reset, DOCUMENTS.set(inputs.get("documents")))
        output = run(**{name: value for name, value in given.items() if name in taken})
    if watcher is not None:
        trace.head, trace.head_input = head_of(model, output), watcher.hidden
    if "logits" in needs.model:
        assert watcher is None, "the head is watched and makes no logits"
        trace.logits = logits_of(output, trace.mask)
    missing = [
        f"{name} of layer {i}"
        for i, reads in needs.layers.items()
        for name in sorted(reads)
        if getattr(trace.layer(i), name) is None
    ]
    roles = matrix_sizes(layer_modules(model)[0]) if needs.matrices else ()
    missing += [
        f"the {of} of {role} of layer {i}"
        for i, reads in needs.matrices.items()
        for role, of in sorted(reads)
        if role in roles and getattr(trace.layer(i).matrices.get(role), of, None) is None
    ]
    assert not missing, f"{type(model).__name__} did not show {', '.join(missing)}"
    return trace
