"""The output head of a language model. A row of logits per token is too much to keep, so a trace
keeps what enters the head instead, and who reads logits makes them a few rows at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlkd_dist.rules.allowed import UserError

# What the head is taken to say while it is watched: what the model makes of these tells its scale
# and its soft cap.
PROBE = (-2.0, 0.5, 3.0)
PROBED: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class HeadRows:
    """Rows of logits before they are multiplied out: z = soft_cap tanh(scale weight hidden /
    soft_cap), without a soft cap scale weight hidden."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    scale: float = 1.0
    soft_cap: float | None = None

    def first(self, vocabulary: int) -> "HeadRows":
        """The logits of the first entries of the vocabulary only."""
        return replace(self, weight=self.weight[:vocabulary])

    def of(self, hidden: Tensor) -> "HeadRows":
        """The logits of some of the rows."""
        return replace(self, hidden=hidden)

    def logits(self) -> Tensor:  # [N, V] fp32
        logits = self.scale * (self.hidden.float() @ self.weight.float().mT)
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()


@dataclass(frozen=True)
class TopKRows:
    """Rows of logits of which the k largest are kept, and of the others one sum."""

    gaps: Tensor  # [N, k] fp16, less the largest of the row
    ids: Tensor  # [N, k] int32, their places in the vocabulary
    # [N, temperatures] log sum exp(gap / temperature) over the others; None where there are none
    rest: Tensor | None
    temperatures: tuple[float, ...]
    vocabulary: int  # how many entries the teacher chose from

    def to(self, device: torch.device, non_blocking: bool = False) -> "TopKRows":
        names = ("gaps", "ids", "rest")
        given = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{n: x if x is None else x.to(device, None, non_blocking) for n, x in given.items()},
        )

    def scores(self, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `mlkd_kernels.top_k_divergence` takes them."""
        scores = self.gaps.float() / temperature
        if self.rest is None:
            return scores, self.ids.long(), None
        return scores, self.ids.long(), self.rest[:, self.temperatures.index(temperature)]


def top_k_rows(
    logits: Tensor,  # [N, V]
    k: int,
    temperatures: tuple[float, ...],
) -> TopKRows:
    largest, ids = logits.topk(k)
    top = largest[:, :1]
    rest = None
    if k < logits.shape[1]:
        others = logits.scatter(1, ids, float("-inf")) - top
        rest = torch.stack([(others / t).logsumexp(-1) for t in temperatures], 1)
    gaps = (largest - top).clamp_min(torch.finfo(torch.float16).min).half()
    return TopKRows(gaps, ids.int(), rest, temperatures, logits.shape[1])


def ungathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Head:
    """The module that makes logits of hidden states, and what the model does to them after it."""

    module: nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None
    gather: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = ungathered

    def rows(self, hidden: Tensor) -> HeadRows:  # [N, D]
        weight, bias = self.module.weight, self.module.bias
        if bias is not None:
            weight = torch.cat([weight, bias.unsqueeze(-1)], -1)
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], -1)
        return HeadRows(hidden, weight, self.scale, self.soft_cap)

    @contextmanager
    def opened(self, hidden: Tensor) -> Iterator[HeadRows]:
        """For reading: the weights are whole while this is open. Every process must open it."""
        with self.gather(list(self.module.parameters())):
            yield self.rows(hidden)

    def within(self, hidden: Tensor, work: Callable[[HeadRows], Tensor]) -> Tensor:
        """`work` in the place of the head's forward: ZeRO-3's hooks then gather the weights for it,
        and once more for its backward pass, as for any module of the engine."""
        module, before = self.module, vars(self.module).get("forward")
        module.forward = lambda hidden: work(self.rows(hidden))
        try:
            return module(hidden)
        finally:
            del module.forward
            if before is not None:
                module.forward = before


class Watcher(nn.Module):
    """Stands in the head's place: it keeps what enters, and needs no weights."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head, self.hidden = [head], None

    @property
    def weight(self) -> nn.Parameter:
        """Some models ask for its type."""
        return self.head[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden.new_tensor(PROBE).expand(*hidden.shape[:-1], len(PROBE))


@contextmanager
def watched_head(model: PreTrainedModel) -> Iterator[Watcher]:
    """While this is open, the model's head is a Watcher."""
    head = model.get_output_embeddings()
    parent, name = next(
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child is head
    )
    watcher = Watcher(head)
    parent._modules[name] = watcher
    try:
        yield watcher
    finally:
        parent._modules[name] = head


def check_linear_head(model: PreTrainedModel, path: str) -> None:
    """ValueError for a model whose logits are not made by one matrix."""
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(
            f"model {path!r}: {type(model).__name__} makes its logits by something other than a "
            f"linear layer, which losses over a vocabulary need; use another model."
        )


def head_of(model: PreTrainedModel, output: Any) -> Head:
    """The head of a model that has just run with it watched, and gave `output`."""
    if model not in PROBED:
        PROBED[model] = probed(model, output.logits)
    scale, soft_cap = PROBED[model]
    return Head(model.get_output_embeddings(), scale, soft_cap)


def probed(model: PreTrainedModel, seen: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap of its logits: what its config says, checked by what it made of PROBE.
    Granite divides by what it calls logits_scaling, HyperCLOVA X multiplies by it."""
    config = model.config.get_text_config()
    soft_cap = getattr(config, "final_logit_softcapping", None)
    scaling = getattr(config, "logits_scaling", 1)
    probe = torch.tensor(PROBE).unsqueeze(-1)
    found = seen.detach().flatten(0, -2)[0].float().cpu()
    for scale in (getattr(config, "logit_scale", None) or 1 / scaling, scaling):
        expected = HeadRows(probe, torch.ones(1, 1), scale, soft_cap).logits().squeeze(-1)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=0.02):
            return scale, soft_cap
    raise UserError(
        f"{type(model).__name__} changes its logits in a way that is not known here "
        f"({list(PROBE)} becomes {found.tolist()}); losses over a vocabulary need a model "
        f"whose logits are scaled or soft-capped at most."
    )
