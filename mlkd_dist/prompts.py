"""What a config may say of answers to prompts: those that are measured, and those that are learned
from."""

from mlkd_dist.allowed import at_least
from mlkd_dist.config import Config, UserError


def check_generate(config: Config) -> None:
    given = config.task.generate
    if given is None:
        return
    refuse_without_prompts("task.generate", config)
    at_least("task.generate.rows", given.rows, 0)
    at_least("task.generate.max_new_tokens", given.max_new_tokens, 1)


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
    return found


def check_positions(config: Config, path: str, limit: int) -> None:
    """That a prompt that all but fills the window leaves positions for what is said after it."""
    for key, tokens in new_tokens(config).items():
        if config.data.max_length + tokens > limit:
            raise UserError(
                f"{key}: {tokens} tokens after prompts of up to data.max_length "
                f"({config.data.max_length}) are more than the {limit} that {path!r} takes; lower "
                f"one of them."
            )
