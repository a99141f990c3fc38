"""What models answer to held-out prompts, for the report."""

from itertools import islice
from typing import Any

from mlkd_dist.config import Config, GenerateConfig
from mlkd_dist.generation.generate import generate
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.models.model import read_config
from mlkd_dist.processes.world import gather_objects
from mlkd_dist.run import Run
from mlkd_dist.teacher import Teacher


class Answers:
    """The first held-out prompts, as many as are asked for; none where the rows have no prompts."""

    def __init__(self, run: Run):
        self.run, self.asked = run, asked(run.config, run.task)
        found = (e for row in run.held_out for e in run.task.examples(row)) if self.asked else ()
        self.examples = list(islice(found, self.asked.rows)) if self.asked else []

    def of(self, model: Teacher) -> list[list[int]]:
        """What the model says after each prompt, greedily and in their order. All processes call
        this."""
        config, world, rows = self.run.config, self.run.world, len(self.examples)
        if not rows:
            return []
        size = min(config.batch.evaluation, rows)
        sampler = Sampler(rows, size, 1, world.rank, world.size, seed=0, shuffle=False)
        found = []
        for step in range(sampler.steps_per_epoch):
            (slots,) = sampler.step(step)
            # An empty slot is answered too: all processes ask as often.
            said = generate(
                model.model,
                [self.examples[max(slot, 0)][0] for slot in slots],
                self.run.tokenizer,
                world.device,
                self.asked.max_new_tokens,
                config.data.max_length,
                sharded=model.engine is not None,
            )
            found.append([tokens for slot, tokens in zip(slots, said, strict=True) if slot >= 0])
        steps = zip(*gather_objects(found), strict=True)
        return [tokens for step in steps for part in step for tokens in part]

    def quality(self, answers: list[list[int]]) -> dict[str, float]:
        if not answers:
            return {}
        said, meant = (
            self.run.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (answers, [completion for _, completion in self.examples])
        )
        return self.run.task.answer_quality(said, meant)


def asked(config: Config, task: Any) -> GenerateConfig | None:
    """How held-out prompts are answered; None where they are not. Where nothing is said of it,
    answers are no longer than the models have positions for."""
    if not getattr(task, "prompted", False):
        return None
    if (found := config.task.generate) is None:
        paths = filter(None, (config.teacher.path, config.student.path))
        models = [read_config(path, config.trust_remote_code) for path in paths]
        limits = [getattr(model, "max_position_embeddings", None) for model in models]
        rooms = [limit - config.data.max_length for limit in limits if limit is not None]
        found = GenerateConfig()
        found.max_new_tokens = min([found.max_new_tokens, *rooms])
    return found if found.rows > 0 and found.max_new_tokens > 0 else None
