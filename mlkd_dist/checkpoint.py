"""Writing models: an ordinary Hugging Face folder that is either whole or not there."""

import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlkd_dist.engine import barrier, whole_weights
from mlkd_dist.low_rank import save


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The trained weights for `AutoModel*.from_pretrained(folder)`, at every ZeRO stage. All
    processes call this."""
    weights = whole_weights(model)
    if weights is not None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save(model, partial, weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    barrier()


def save_projections(projections: nn.ModuleDict, path: Path) -> None:
    """For the next stage; they are no part of the exported student. All processes call this."""
    weights = whole_weights(projections)
    if weights:
        save_file(weights, path)
    barrier()


def load_projections(projections: nn.ModuleDict, path: Path) -> None:
    """Those that an earlier stage trained under the same name and shape, before the engine shards
    them."""
    if not path.exists():
        return
    ours = projections.state_dict()
    trained = {n: w for n, w in load_file(path).items() if n in ours and ours[n].shape == w.shape}
    projections.load_state_dict(ours | trained)
