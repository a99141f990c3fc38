"""What a config may say of answers to prompts: those that are measured, and those that are learned
from."""

from mlkd_dist.config import Config, StageConfig, UserError
from mlkd_dist.rules.allowed import at_least, one_of


def check_generate(config: Config) -> None:
    given = config.task.generate
    if given is None:
        return
    refuse_without_prompts("task.generate", config)
    at_least("task.generate.rows", given.rows, 0)
    at_least("task.generate.max_new_tokens", given.max_new_tokens, 1)


def check_on_policy(config: Config) -> None:
    for index, stage in enumerate(config.stages):
        if stage.on_policy is not None:
            check_policy(f"stages[{index}].on_policy", stage, config)


def check_policy(key: str, stage: StageConfig, config: Config) -> None:
    given = stage.on_policy
    refuse_without_prompts(key, config)
    if not 0 <= given.fraction <= 1:
        raise UserError(
            f"{key}.fraction: {given.fraction} is not allowed; it must lie between 0 and 1."
        )
    one_of(f"{key}.by", given.by, ["student", "teacher"])
    at_least(f"{key}.temperature", given.temperature, 0)
    if not 0 < given.top_p <= 1:
        raise UserError(
            f"{key}.top_p: {given.top_p} is not allowed; it must be above 0 and at most 1."
        )
    if given.temperature == 0 and given.top_p < 1:
        raise UserError(
            f"{key}.top_p: {given.top_p} is given with temperature 0, which takes the most likely "
            f"token; remove it, or set a temperature."
        )
    at_least(f"{key}.max_new_tokens", given.max_new_tokens, 1)
    if config.data.pack:
        raise UserError(
            f"{key}: answers are as long as they turn out, and data.pack fills sequences before "
            f"that; use data.pack=false."
        )
    if given.fraction > 0 and config.teacher.cache is not None:
        raise UserError(
            f"{key}: teacher.cache holds what the teacher says of the data, and of no answer that "
            f"is still to be given; use teacher.cache=null, or remove on_policy."
        )
    if given.by == "student" and given.fraction > 0 and "hard_labels" in stage.losses:
        raise UserError(
            f"{key}: hard_labels would take the student's own answers for the truth; remove that "
            f"loss, give it a stage of its own, or use by: teacher."
        )
    if given.by == "teacher" and given.fraction > 0 and config.teacher.path is None:
        raise UserError(
            f"{key}.by: teacher needs teacher.path; give a folder, package:NAME/path or hub name."
        )


def refuse_without_prompts(key: str, config: Config) -> None:
    if config.task.kind != "causal_lm":
        raise UserError(
            f"{key}: only for task.kind causal_lm, given with {config.task.kind}; remove it."
        )
    if config.data.prompt is None and config.data.messages is None:
        raise UserError(
            f"{key}: the documents of data.text have no prompts to answer; remove it, or name "
            f"columns as data.prompt and data.completion, or as data.messages."
        )


def new_tokens(config: Config) -> dict[str, int]:
    """The keys that ask for new tokens after a prompt, and how many."""
    given = config.task.generate
    found = {"task.generate.max_new_tokens": given.max_new_tokens} if given and given.rows else {}
    return found | {
        f"stages[{index}].on_policy.max_new_tokens": stage.on_policy.max_new_tokens
        for index, stage in enumerate(config.stages)
        if stage.on_policy is not None and stage.on_policy.fraction > 0
    }


def check_answers_fit(config: Config, path: str, limit: int) -> None:
    """That a prompt that all but fills the window leaves positions for what is said after it."""
    for key, tokens in new_tokens(config).items():
        if config.data.max_length + tokens > limit:
            raise UserError(
                f"{key}: {tokens} tokens after prompts of up to data.max_length "
                f"({config.data.max_length}) are more than the {limit} that {path!r} takes; lower "
                f"one of them."
            )
