"""Whether each loss trains the student, looked at when it first counts.

Tensors that lost their graph on the way give a loss that falls no more, or falls by its projection
alone, and no error: so with reentrant checkpointing under ZeRO-3, or a model that detaches what it
shows. Others have a graph, and nothing comes back through it. So there are two questions: whether a
gradient has a way from the loss to a weight of the student, asked of the graph before the backward
pass; and whether the gradient that arrives at what the loss reads of the student is any, asked of
its numbers after it.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlkd_dist.config import UserError
from mlkd_dist.processes.signals import say
from mlkd_dist.processes.world import all_reduce

# A loss, and the student layer of its pair.
Key = tuple[str, int | None]
# A loss below this, per row, is rounding: where a student begins as its teacher there is none.
NOTHING = 1e-6
# Steps in which a loss may be nothing before that is said.
PATIENT = 20
# What is counted of a loss in a step: passes in which some number of its gradient is finite and not
# 0, or is not finite; in which its value is finite and not 0, or is not finite; its size, per row;
# and passes whose total is not finite, which makes every gradient so.
MOVED, WILD, VALUED, LOST, SIZE, SPOILED = range(6)


class Reach:
    """Of the losses of one stage into the weights of its student."""

    def __init__(self, unweighted: Iterable[str] = ()) -> None:
        """`unweighted` losses are logged only."""
        self.unweighted = set(unweighted)
        # Losses that go through a map which begins as the identity: where the student does as its
        # teacher, they are not 0, and yet nothing comes back through it before it has moved.
        self.projected: set[str] = set()
        self.weights: set[int] = set()
        self.seen: set[Key] = set()
        # Losses whose gradient is known to be one, and how often others were found to be nothing.
        self.settled: set[Key] = set()
        self.looks: dict[Key, int] = {}
        # Of this step.
        self.counts: dict[Key, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def into(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = {id(weight) for weight in weights if weight.requires_grad}

    def check(self, name: str, layer: int | None, value: Tensor) -> None:
        """That the gradient of a loss, or of its pair with student layer `layer`, has a way to a
        weight of the student. Raises UserError, on all processes alike."""
        if not self.weights or not torch.is_grad_enabled():
            return
        if (counts := self.counts.get((name, layer))) is not None:
            size = value.detach().abs() / self.rows[name]
            counts[VALUED] += size.isfinite() & (size > 0)
            counts[LOST] += ~size.isfinite()
            counts[SIZE] += size.nan_to_num(0.0, 0.0)
        if (name, layer) in self.seen:
            return
        self.seen.add((name, layer))
        if not reaches(value, self.weights):
            raise UserError(
                f"{told(name, layer)}: its gradient reaches no weight of the student, which it "
                f"would never train; remove this loss, or use a model that does not detach what "
                f"the loss reads."
            )

    def shown(self, name: str, layer: int | None, what: Any) -> Any:
        """What a loss reads of the student, of tensors that are its own, so that their gradient is
        that of this loss alone. They are made at every step, looked at or not: else a run that goes
        on would add up gradients in another order."""
        key = name, layer
        look = bool(self.weights) and key not in self.settled and name not in self.unweighted

        def own(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad or not torch.is_grad_enabled():
                return tensor
            tensor = tensor.view_as(tensor)
            if look:
                if key not in self.counts:
                    self.counts[key] = torch.zeros(6, device=tensor.device)
                tensor.register_hook(partial(came, self.counts[key]))
            return tensor

        return each(what, own)

    def total(self, loss: Tensor) -> None:
        """Of all losses of this pass."""
        for counts in self.counts.values():
            counts[SPOILED] += ~loss.detach().isfinite()

    def verdict(self) -> None:
        """After the backward passes of a step, of the losses that were looked at in it. Raises
        UserError for one whose gradient is 0 or not finite in all rows of all processes, on all of
        them alike."""
        found, self.counts = self.counts, {}
        if not found:
            return
        sums = all_reduce(torch.stack([*found.values()]))
        for key, counts in zip(found, sums.tolist(), strict=True):
            self.judge(key, counts)

    def judge(self, key: Key, counts: list[float]) -> None:
        wrong, first = None, key not in self.looks
        if counts[MOVED]:
            self.settled.add(key)
        elif counts[LOST] and not counts[VALUED]:
            wrong = "it is not finite in any row of any process" if first else None
        elif counts[SPOILED]:
            # The step is skipped; which loss it was is for the log to tell.
            pass
        elif counts[WILD]:
            wrong = "its gradient is not finite, though the loss is" if first else None
        elif counts[SIZE] > NOTHING and self.waited_for(key):
            wrong = f"it is {counts[SIZE]:.4g}, and its gradient 0 in all rows of all processes"
        else:
            self.nothing(key)
        if wrong:
            raise UserError(
                f"{told(*key)}: where it first counts, {wrong}, so that it trains "
                f"nothing; remove this loss or change its options, or look at the models and data."
            )

    def waited_for(self, key: Key) -> bool:
        return key[0] not in self.projected or self.looks.get(key, 0) + 1 == PATIENT

    def nothing(self, key: Key) -> None:
        """Loss and gradient are 0: right where a student begins as its teacher, for a while."""
        self.looks[key] = self.looks.get(key, 0) + 1
        if self.looks[key] == PATIENT:
            self.settled.add(key)
            say(
                f"warning: {told(*key)}: loss and gradient were 0 in each of {PATIENT} steps; it "
                f"trains nothing while the student is there what its teacher is."
            )


def came(counts: Tensor, gradient: Tensor) -> None:
    finite = gradient.isfinite()
    counts[MOVED] += (finite & (gradient != 0)).any()
    counts[WILD] += (~finite).any()


def told(name: str, layer: int | None) -> str:
    return f"losses.{name}" + ("" if layer is None else f", student layer {layer}")


def each(what: Any, own: Any) -> Any:
    """A copy in which `own` took the place of every tensor, also in dicts and in what functions
    return; layers of a trace are left as they are, since who reads one gets it by itself."""
    if isinstance(what, Tensor):
        return own(what)
    if isinstance(what, dict):
        return {name: each(value, own) for name, value in what.items()}
    if callable(what) and not isinstance(what, nn.Module):
        return lambda *given: each(what(*given), own)
    if not is_dataclass(what):
        return what
    parts = {field.name: getattr(what, field.name) for field in fields(what) if field.init}
    return replace(what, **{n: each(p, own) for n, p in parts.items() if n not in LEFT})


# Of a trace: other losses' business. Of a head: weights, which all losses over it share.
LEFT = ("layers", "head", "weight")


def reaches(value: Tensor, weights: set[int]) -> bool:
    """By the graph alone: nothing is computed, and nothing sharded is gathered."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in weights:
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False
