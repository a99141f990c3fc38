"""What `open` of a stage may say, and with which losses."""

from dataclasses import fields
from typing import Any

from mlkd_dist.config import OpenConfig, UserError
from mlkd_dist.rules.allowed import at_least, one_of, share
from mlkd_dist.rules.schema import loss_schema


def check_open(where: str, rule: OpenConfig, losses: dict[str, dict[str, Any]]) -> None:
    """Fills in the defaults, too."""
    one_of(f"{where}.open.rule", rule.rule, ["all", "pid", "sid"])
    if rule.rule == "all":
        given = [
            f.name for f in fields(rule) if f.name != "rule" and getattr(rule, f.name) is not None
        ]
        if given:
            raise UserError(
                f"{where}.open.{given[0]}: only for the rules pid and sid; set {where}.open.rule, "
                f"or remove it."
            )
        return
    schemas = [loss_schema(name) for name in losses]
    of_layers = any(schema.in_pairs for schema in schemas)
    # At last all layers learn from the top; from the embeddings none would.
    of_top = any(not schema.in_pairs and schema.reads != ("embedding",) for schema in schemas)
    if not (of_layers and of_top):
        lacking = "on top of all layers, such as soft_labels" if of_layers else "of layers"
        raise UserError(
            f"{where}.open: {rule.rule} opens layer after layer, and at last leaves only the "
            f"losses without layers, but there is no loss {lacking}; add one, or remove open."
        )
    # They would get no gradient at all, and ZeRO-3 then takes that of an earlier step again.
    local = [name for name, given in losses.items() if given.get("input") == "teacher"]
    if local and rule.rule == "pid":
        raise UserError(
            f"{where}.open.rule: pid goes on to the next layer, and {local[0]} with input: "
            f"teacher then leaves the layers below without a gradient; use sid, or input: own."
        )
    if rule.threshold is None:
        rule.threshold = 0.05 if "cls_cosine" in losses else 0.0
    if rule.threshold and "cls_cosine" not in losses:
        raise UserError(
            f"{where}.open.threshold: {rule.threshold} is compared with the loss cls_cosine, which "
            f"this stage has not; add it, or set 0."
        )
    rule.keep_soft_labels = bool(rule.keep_soft_labels)
    rule.check_every = 10 if rule.check_every is None else rule.check_every
    at_least(f"{where}.open.threshold", rule.threshold, 0)
    at_least(f"{where}.open.check_every", rule.check_every, 1)
    if rule.classifier is not None:
        share(f"{where}.open.classifier", rule.classifier)
