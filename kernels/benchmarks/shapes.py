"""The shapes that the benchmarks of relation_kl and linear_divergence share."""

from typing import NamedTuple


class Relation(NamedTuple):
    batch: int
    length: int
    heads: int
    teacher_width: int  # of one head
    student_width: int
    causal: bool = False


class Heads(NamedTuple):
    rows: int
    vocabulary: int
    student_width: int
    teacher_width: int
    kind: str = "forward_kl"


RELATIONS = {
    "short": Relation(16, 128, 12, 64, 32),
    "middle": Relation(8, 512, 12, 64, 32),
    "long": Relation(2, 2048, 12, 64, 32),
    "long-causal": Relation(2, 2048, 12, 64, 32, causal=True),
    "embedding": Relation(16, 128, 1, 768, 384),
}
HEADS = {
    "medium": Heads(2048, 32000, 512, 256),
    "medium-jsd": Heads(2048, 32000, 512, 256, "jsd"),
    "small": Heads(512, 8000, 384, 256),
}
# Small enough for float64 matrices on any machine.
CHECKED_RELATION = Relation(2, 300, 3, 32, 16)
CHECKED_HEADS = Heads(700, 1000, 64, 48)
