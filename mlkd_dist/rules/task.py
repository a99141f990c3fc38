"""What a task asks of the data, and which options are its own."""

from pathlib import Path

from mlkd_dist.config import Config, UserError
from mlkd_dist.rules.allowed import at_least, one_of, share
from mlkd_dist.rules.schema import loss_schema, names

TASKS = Path(__file__).parent.parent / "tasks"
# Options of one task only; set for another task they would be ignored.
TASK_OPTIONS = {
    "pooling": "embedding",
    "labels": "classification",
    "stride": "question_answering",
    "mask_probability": "masked_lm",
}
ONE_TEXT = ["embedding", "masked_lm", "causal_lm"]
# Tasks with a row of logits per token.
VOCABULARY = ["masked_lm", "causal_lm"]


def check_task(config: Config) -> None:
    one_of("task.kind", config.task.kind, names(TASKS))
    for option, kind in TASK_OPTIONS.items():
        if getattr(config.task, option) is not None and config.task.kind != kind:
            raise UserError(
                f"task.{option}: only for task.kind {kind}, given with {config.task.kind}; remove "
                f"it."
            )
    if config.data.text_pair is not None and config.task.kind in ONE_TEXT:
        raise UserError(
            f"data.text_pair: the task {config.task.kind} reads one text per row; remove it."
        )
    check_text(config)
    if config.data.text_pair is None and config.task.kind == "question_answering":
        raise UserError(
            "data.text_pair: question_answering reads questions from data.text and passages from "
            "data.text_pair; name both columns, and that of the answers as data.label."
        )
    if config.task.stride is not None:
        at_least("task.stride", config.task.stride, 0)
    if config.task.pooling is not None:
        one_of("task.pooling", config.task.pooling, ["mean", "cls", "last"])
    if config.task.mask_probability is not None:
        share("task.mask_probability", config.task.mask_probability)
    if config.task.labels is not None:
        at_least("task.labels", config.task.labels, 2)


def check_text(config: Config) -> None:
    """What causal_lm learns from: documents, completions of prompts, or chats."""
    data = config.data
    for name in ("prompt", "completion", "messages"):
        if getattr(data, name) is not None and config.task.kind != "causal_lm":
            raise UserError(
                f"data.{name}: only for task.kind causal_lm, given with {config.task.kind}; remove "
                f"it."
            )
    if (data.prompt is None) != (data.completion is None) or (
        data.prompt is not None and data.prompt == data.completion
    ):
        raise UserError(
            f"data.prompt, data.completion: {data.prompt!r} and {data.completion!r} are given; "
            f"name two columns, or neither."
        )
    if data.messages is not None and data.prompt is not None:
        raise UserError(
            "data.messages: given beside data.prompt; use one of them: chats, or prompts with "
            "completions."
        )


def check_pack(config: Config) -> None:
    if not config.data.pack:
        return
    if config.task.kind != "causal_lm":
        raise UserError(
            f"data.pack: true is only for task.kind causal_lm, given with {config.task.kind}; use "
            f"false."
        )
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        if model.attention.startswith("flash"):
            raise UserError(
                f"{who}.attention: {model.attention} cannot keep the documents of a packed "
                f"sequence apart; use sdpa, or data.pack=false."
            )
    for index, stage in enumerate(config.stages):
        for name in stage.losses:
            if not loss_schema(name).packed:
                raise UserError(
                    f"stages[{index}].losses.{name}: this loss compares tokens or samples with one "
                    f"another and would mix the documents of a packed sequence; use "
                    f"data.pack=false, or losses such as soft_labels and hidden_mse."
                )
