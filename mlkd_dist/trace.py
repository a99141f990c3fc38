"""What a model shows while it runs, and what may be asked of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlkd_dist.models.head import Head, TopKRows

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
