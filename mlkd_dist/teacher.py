"""A frozen model: `teacher(batch) -> Trace`. It has no optimizer, is never saved, and is loaded
only as deep as what is read of it. Students are evaluated through it too."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModel

from mlkd_dist.config import TeacherConfig
from mlkd_dist.engine import frozen_config, frozen_engine, gathered
from mlkd_dist.models.model import cut_layers, load_model, read_config
from mlkd_dist.models.nodes import shard_group
from mlkd_dist.models.tap import capture
from mlkd_dist.processes.world import World
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Needs, Trace


class Teacher:
    def __init__(
        self,
        path: str,
        settings: TeacherConfig,
        model_class: Any,
        needs: Needs,
        world: World,
        trust_remote_code: bool = False,
    ):
        self.needs = needs
        config = read_config(path, trust_remote_code)
        depth = needs.depth()
        if depth is not None and depth < config.num_hidden_layers:
            config = cut_layers(config, list(range(depth)))
        ds_config = frozen_config(settings.dtype, settings.zero_stage, settings.offload)
        sharded = settings.zero_stage == 3
        self.model = load_model(
            model_class if needs.model & {"logits", "head"} else AutoModel,
            path,
            config=config,
            dtype=settings.dtype,
            attention=settings.attention,
            zero_stage=settings.zero_stage,
            ds_config=ds_config,
            shard_group=shard_group(settings.shard_group, world) if sharded else None,
            offload_dir=settings.offload_dir,
            trust_remote_code=trust_remote_code,
        )
        self.model.requires_grad_(False).eval()
        # At ZeRO 0 an engine would add nothing to a module that is never trained.
        if settings.zero_stage == 0:
            self.engine, self.run = None, self.model.to(world.device)
        else:
            self.engine = self.run = frozen_engine(self.model, ds_config)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Trace:
        trace = capture(self.run, self.model, batch.inputs, self.needs, batch.labels)
        if trace.head is not None:
            trace.head = replace(trace.head, gather=gathered)
        return trace

    def close(self) -> None:
        """Free the weights."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine = self.run = self.model = None
