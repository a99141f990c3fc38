"""How a model comes to show what happens inside: the attention tap, and the hooks that live for one
pass."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
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

from mlkd_dist.models.head import head_of, watched_head
from mlkd_dist.models.linears import Applied, layer_matrices, matrices, matrix_sizes, part
from mlkd_dist.models.roles import NAMES
from mlkd_dist.trace import ATTENTION_READS, VECTOR_READS, Matrix, Needs, Trace, sample_vector

TAP = "mlkd_tap_"


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
            query, scale = unscaled(module, query, kwargs.get("scaling"))
            recorder.attention(query, key, value, context, scale, causal)
        return context, weights

    return attention


def unscaled(module: nn.Module, query: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """Queries as their matrix makes them, and the scale of their scores: OPT scales its queries
    before attention, which then has none to apply."""
    own = getattr(module, "scaling", None)
    if scale != 1 or own in (None, 1):
        return query, scale
    return query / own, own


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


def first_position(model: PreTrainedModel) -> int:
    """0, but for models that count positions from their padding token's number on, as RoBERTa."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    pads = (getattr(table, "padding_idx", None) for table in tables)
    return next((pad + 1 for pad in pads if pad is not None), 0)


def taken_inputs(model: PreTrainedModel) -> set[str]:
    """What its forward takes; of RoBERTa not the token types, of which it has one only."""
    taken = set(inspect.signature(model.forward).parameters)
    one_type = getattr(model.config, "type_vocab_size", 2) == 1
    return taken - {"token_type_ids"} if one_type else taken


def capture(
    run: Callable[..., Any],
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    needs: Needs,
    labels: Tensor | None,
) -> Trace:
    """`run(**inputs)`, where `run` is the model or the engine around it, and what it showed."""
    trace = Trace(inputs["attention_mask"].bool(), head_count(model), labels=labels)
    # A tokenizer may give more than a family takes; only decoders know a cache.
    taken, given = taken_inputs(model), {"use_cache": False, **inputs}
    if "position_ids" in given and (first := first_position(model)):
        given["position_ids"] = given["position_ids"] + first
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
