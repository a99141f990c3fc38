"""Whether each loss trains the student, looked at when it first counts.

Tensors that lost their graph on the way give a loss that falls no more, or falls by its projection
alone, and no error: so with reentrant checkpointing under ZeRO-3, or a model that detaches what it
shows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mlkd_dist.config import UserError


class Reach:
    """Of the losses of one stage into the weights of its student."""

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.seen: set[tuple[str, int | None]] = set()

    def into(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = {id(weight) for weight in weights if weight.requires_grad}

    def check(self, name: str, layer: int | None, value: Tensor) -> None:
        """That the gradient of a loss, or of its pair with student layer `layer`, has a way to a
        weight of the student. Raises UserError, on all processes alike."""
        if (name, layer) in self.seen or not self.weights or not torch.is_grad_enabled():
            return
        self.seen.add((name, layer))
        if not reaches(value, self.weights):
            where = f"losses.{name}" + ("" if layer is None else f", student layer {layer}")
            raise UserError(
                f"{where}: its gradient reaches no weight of the student, which it would never "
                f"train; remove this loss, or use a model that does not detach what the loss reads."
            )


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
