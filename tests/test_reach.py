"""Losses whose gradient does not reach the student."""

import pytest
import torch
from torch import nn

from mlkd_dist.config import UserError
from mlkd_dist.reach import Reach


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


@pytest.fixture
def reach(model: nn.Sequential) -> Reach:
    found = Reach()
    found.into(model.parameters())
    return found


ROWS = torch.ones(2, 3)


def test_what_trains_any_weight_is_left_alone(model: nn.Sequential, reach: Reach) -> None:
    reach.check("hidden_mse", 0, model(ROWS).square().sum())
    # A loss of zero trains, too: a student may begin as its teacher.
    reach.check("hidden_mse", 1, (model(ROWS) * 0).sum())
    model[2].requires_grad_(False)
    reach.into(model.parameters())
    reach.check("embedding_mse", None, model(ROWS).sum())
    hidden = torch.utils.checkpoint.checkpoint(model, ROWS, use_reentrant=False)
    reach.check("soft_labels", None, hidden.sum())


@pytest.mark.parametrize("how", ["detached", "projection", "constant", "reentrant"])
def test_what_trains_none_is_refused_by_name(model: nn.Sequential, reach: Reach, how: str) -> None:
    projection = nn.Linear(3, 3)
    value = {
        "detached": lambda: model(ROWS).detach().sum(),
        # What a loss after a projection becomes: it falls, and the student learns nothing.
        "projection": lambda: projection(model(ROWS).detach()).sum(),
        "constant": lambda: torch.zeros(()),
        # No input of the block requires a gradient: its output has none, whatever its weights do.
        "reentrant": lambda: projection(
            torch.utils.checkpoint.checkpoint(model, ROWS, use_reentrant=True)
        ).sum(),
    }[how]()
    with pytest.raises(UserError, match=r"losses\.hidden_mse, student layer 1: its gradient"):
        reach.check("hidden_mse", 1, value)


def test_each_loss_and_layer_is_looked_at_once(model: nn.Sequential, reach: Reach) -> None:
    sound, lost = model(ROWS).sum(), torch.zeros(())
    with torch.no_grad():
        reach.check("hidden_mse", 0, lost)
    reach.check("hidden_mse", 0, sound)
    reach.check("hidden_mse", 0, lost)
    for name, layer in (("hidden_mse", 1), ("cls_cosine", 0), ("hidden_mse", None)):
        with pytest.raises(UserError):
            reach.check(name, layer, lost)
