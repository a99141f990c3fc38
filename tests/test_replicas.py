"""The teacher of every process shows the same, or the processes that differ are named."""

import re

import pytest
import torch
from torch import nn

from mlkd_dist.models.head import Head
from mlkd_dist.trace import Layer, Trace
from mlkd_dist.watching.replicas import refuse_different, summary
from mlkd_dist.watching.watch import Desynchronised

TOLERANCE = 1e-3


def seen(processes: int) -> torch.Tensor:  # [processes, 2, tensors, 2]
    torch.manual_seed(0)
    return torch.rand(3, 2, dtype=torch.float64).expand(processes, 2, 3, 2).clone()


def refusal(found: torch.Tensor) -> str:
    with pytest.raises(Desynchronised) as caught:
        refuse_different(found, TOLERANCE)
    return str(caught.value)


def test_what_agrees_passes() -> None:
    for processes in (1, 2, 5):
        refuse_different(seen(processes), TOLERANCE)
    rounded = seen(3) * (1 + 1e-5 * torch.rand(3, 1, 1, 1))
    refuse_different(rounded, TOLERANCE)
    # That a teacher says nothing at all is found by the first step.
    refuse_different(torch.full((3, 2, 3, 2), torch.nan), TOLERANCE)


@pytest.mark.parametrize(
    "processes,odd,said",
    [
        (4, [3], "process 3 says"),
        (4, [0], "process 0 says"),
        (5, [0, 2], "process 0, 2 says"),
        (2, [1], "process 1 says"),
        (1000, list(range(500, 520)), "500, 501, 502, 503, 504, 505, 506, 507 and 12 more says"),
    ],
)
def test_those_that_are_fewer_are_named(processes: int, odd: list[int], said: str) -> None:
    found = seen(processes)
    found[odd, :, 1] *= 1.01
    assert said in refusal(found)
    found = seen(processes)
    found[odd, :, 1] = torch.nan
    assert said in refusal(found)


def test_a_process_that_says_other_things_the_second_time_is_named() -> None:
    found = seen(4)
    found[2, 1, 0, 1] += 1
    assert "process 2 says other things in a second pass" in refusal(found)


def trace(head: nn.Linear | None = None) -> Trace:
    torch.manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    made = Trace(mask, 2, embedding=torch.randn(2, 5, 8))
    made.layers[0] = Layer(mask, 2, hidden=torch.randn(2, 5, 8))
    made.vectors["mean"] = torch.randn(2, 8)
    if head is not None:
        made.head, made.head_input = Head(head), torch.randn(2, 5, 8)
    return made


@pytest.mark.parametrize("where", ["embedding", "hidden", "vector", "head"])
def test_every_tensor_counts(where: str) -> None:
    head = nn.Linear(8, 11)
    before, changed = summary(trace(head)), trace(head)
    assert before.shape == (5, 2)
    refuse_different(torch.stack([before] * 2).expand(3, 2, 5, 2), TOLERANCE)
    with torch.no_grad():
        tensors = {
            "embedding": changed.embedding,
            "hidden": changed.layers[0].hidden,
            "vector": changed.vectors["mean"],
            "head": head.weight,
        }
        # No norm shows that numbers have changed places.
        row = tensors[where].view(-1, 8)[0]
        row.copy_(row.roll(1))
    after = summary(changed)
    found = torch.stack([before, before, after]).unsqueeze(1).expand(3, 2, 5, 2)
    assert re.search("process 2 says", refusal(found))


def test_a_number_per_sample_is_one_row() -> None:
    mask, logits = torch.ones(8, 5, dtype=torch.bool), torch.arange(8.0)
    one, other = (Trace(mask, 2, logits=logits.roll(places)) for places in (0, 1))
    found = torch.stack([summary(one), summary(one), summary(other)])
    found = found.unsqueeze(1).expand(3, 2, 1, 2)
    assert re.search("process 2 says", refusal(found))
