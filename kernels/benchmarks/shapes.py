"""The shapes that are measured: one registry, on the sizes of models that people distil.

Widths of a head, batch and length as the models have them in training. The codes in the comments
are those that gpu_session.py gives to the groups it runs in turn.
"""

from typing import NamedTuple


class Relation(NamedTuple):
    batch: int
    length: int
    heads: int
    teacher_width: int  # of one head
    student_width: int
    causal: bool = False


class Attention(NamedTuple):
    batch: int
    length: int
    heads: int  # of the queries
    teacher_keys: int  # heads of the keys
    student_keys: int
    teacher_width: int
    student_width: int
    causal: bool = False


class Heads(NamedTuple):
    rows: int
    vocabulary: int
    teacher_width: int
    student_width: int
    kind: str = "forward_kl"


class Samples(NamedTuple):
    samples: int
    teacher_width: int
    student_width: int


class Contrast(NamedTuple):
    samples: int
    width: int


Shape = Relation | Attention | Heads | Samples | Contrast

# operation -> device -> case -> shape. `cuda` begins with what matters most.
SHAPES: dict[str, dict[str, dict[str, Shape]]] = {
    "relation_kl": {
        "cpu": {
            "short": Relation(16, 128, 12, 64, 32),
            "middle": Relation(8, 512, 12, 64, 32),
            "long": Relation(2, 2048, 12, 64, 32),
            "long-causal": Relation(2, 2048, 12, 64, 32, causal=True),
            "embedding": Relation(16, 128, 1, 768, 384),
            "very-long-2-heads": Relation(1, 8192, 2, 64, 32),
            "very-long": Relation(1, 8192, 12, 64, 32),
        },
        "cuda": {
            # K1-a: BERT-base to students of 384 and 768, BERT-large to six of its layers.
            "bert-base-to-384": Relation(16, 512, 12, 64, 32),
            "bert-base-to-768": Relation(16, 512, 12, 64, 64),
            "bert-base-4-heads": Relation(16, 512, 4, 192, 96),
            "bert-large-6-layers": Relation(16, 512, 16, 64, 64),
            # K1-c and K1-e: Qwen3-8B to 0.6B, its queries of 4096 and 2048 in 32 heads and its
            # keys of 1024 and 1024 in 8.
            "qwen3-queries": Relation(16, 2048, 32, 128, 64),
            "qwen3-queries-causal": Relation(16, 2048, 32, 128, 64, causal=True),
            "qwen3-keys-causal": Relation(16, 2048, 8, 128, 128, causal=True),
            "bert-base-long": Relation(16, 2048, 12, 64, 32),
            "wide-heads": Relation(16, 512, 16, 256, 128),
            # K1-b: MiniLMv2's 48 relation heads.
            "48-heads": Relation(16, 512, 48, 64, 16),
            # K4: token similarities of hidden states, one head of the whole width.
            "hidden-512": Relation(16, 512, 1, 1024, 768),
            "hidden-2048": Relation(16, 2048, 1, 1024, 768),
            # K1-d.
            "qwen3-queries-8k": Relation(4, 8192, 32, 128, 64),
            "qwen3-queries-32k": Relation(1, 32768, 32, 128, 64),
        },
    },
    "attention_kl": {
        "cpu": {
            "short": Attention(16, 128, 12, 12, 12, 64, 32),
            "middle": Attention(8, 512, 12, 12, 12, 64, 32),
            "long-grouped-causal": Attention(2, 2048, 12, 4, 4, 64, 32, causal=True),
        },
        "cuda": {
            "bert-base-to-384": Attention(16, 512, 12, 12, 12, 64, 32),
            "bert-large-6-layers": Attention(16, 512, 16, 16, 16, 64, 64),
            # Llama-3.1-8B to Llama-3.2-1B: 32 query heads and 8 key heads in both.
            "llama3-causal": Attention(4, 2048, 32, 8, 8, 128, 64, causal=True),
            "llama3-8k-causal": Attention(1, 8192, 32, 8, 8, 128, 64, causal=True),
        },
    },
    "linear_divergence": {
        "cpu": {
            "small": Heads(512, 8000, 384, 256),
            "medium": Heads(2048, 32000, 512, 256),
            "medium-jsd": Heads(2048, 32000, 512, 256, "jsd"),
        },
        "cuda": {
            # K3-a: a teacher of Llama-3's 8B and its like.
            "llama3-8b-to-8b": Heads(8192, 128256, 4096, 4096),
            "llama3-8b-to-8b-jsd": Heads(8192, 128256, 4096, 4096, "jsd"),
            # K3-b: Llama-3.1-8B to 1B, 70B to 8B, Qwen3-8B to 0.6B, a vocabulary of Llama-2.
            "llama3-8b-to-1b": Heads(8192, 128256, 4096, 2048),
            "llama3-8b-to-1b-reverse": Heads(8192, 128256, 4096, 2048, "reverse_kl"),
            "qwen3-8b-to-0.6b": Heads(8192, 151936, 4096, 1024),
            "llama3-70b-to-8b": Heads(8192, 128256, 8192, 4096),
            "llama2-7b-to-2048": Heads(8192, 32000, 4096, 2048),
            # K3-d: few tokens.
            "llama3-256-tokens": Heads(256, 128256, 4096, 2048),
            "llama3-1024-tokens": Heads(1024, 128256, 4096, 2048),
            # The yardstick: torch has this one itself.
            "llama3-cross-entropy": Heads(8192, 128256, 4096, 4096, "cross_entropy"),
        },
    },
    "similarity_kl": {
        "cpu": {
            "bert-4k": Samples(4096, 768, 384),
            "bert-16k": Samples(16384, 768, 384),
        },
        "cuda": {
            # K2.
            "16k": Samples(16384, 1024, 768),
            "4k": Samples(4096, 1024, 768),
            "1k": Samples(1024, 1024, 768),
            "64k": Samples(65536, 1024, 768),
        },
    },
    "similarity_mse": {
        "cpu": {
            "bert-4k": Samples(4096, 768, 384),
            "bert-16k": Samples(16384, 768, 384),
        },
        "cuda": {
            "16k": Samples(16384, 1024, 768),
            "4k": Samples(4096, 1024, 768),
            "1k": Samples(1024, 1024, 768),
            "64k": Samples(65536, 1024, 768),
        },
    },
    "info_nce": {
        "cpu": {
            "2k-384": Contrast(2048, 384),
            "8k-384": Contrast(8192, 384),
        },
        "cuda": {
            # K5.
            "8k": Contrast(8192, 768),
            "32k": Contrast(32768, 768),
        },
    },
}
# With weights the Triton kernel does what it does without.
SHAPES["relation_kl_sum"] = {"cpu": SHAPES["relation_kl"]["cpu"], "cuda": {}}


def affordable(shape: Shape) -> Shape:
    """A shape like this one of which float64 matrices fit anywhere; no length is a whole number of
    blocks."""
    if isinstance(shape, Relation):
        return shape._replace(batch=2, length=min(shape.length, 300), heads=min(shape.heads, 3))
    if isinstance(shape, Attention):
        # As many queries for a key as in the case.
        teacher, student = shape.heads // shape.teacher_keys, shape.heads // shape.student_keys
        heads = max(teacher, student)
        return shape._replace(
            batch=2,
            length=min(shape.length, 300),
            heads=heads,
            teacher_keys=heads // teacher,
            student_keys=heads // student,
        )
    if isinstance(shape, Heads):
        # More rows and scores than are kept in one piece.
        return shape._replace(rows=min(shape.rows, 700), vocabulary=min(shape.vocabulary, 7001))
    # More than 2^22 scores: what is smaller is kept whole.
    return shape._replace(samples=min(shape.samples, 2100))


def tiny(shape: Shape) -> Shape:
    """The least that goes through the same code."""
    if isinstance(shape, Relation):
        return affordable(shape)._replace(batch=1, length=20, heads=1)
    if isinstance(shape, Attention):
        return affordable(shape)._replace(batch=1, length=20)
    if isinstance(shape, Heads):
        return shape._replace(rows=20, vocabulary=50, teacher_width=48, student_width=32)
    return shape._replace(samples=20)


def described(shape: Shape) -> str:
    """As a table shows it: B16 L512, 12 heads of 64 / 32, causal."""
    if isinstance(shape, Relation):
        heads = "1 head" if shape.heads == 1 else f"{shape.heads} heads"
        text = f"B{shape.batch} L{shape.length}, {heads} of {widths(shape)}"
        return text + ", causal" * shape.causal
    if isinstance(shape, Attention):
        keys = f"{shape.teacher_keys} / {shape.student_keys} of keys"
        text = f"B{shape.batch} L{shape.length}, {shape.heads} heads, {keys}, of {widths(shape)}"
        return text + ", causal" * shape.causal
    if isinstance(shape, Heads):
        return f"N{shape.rows} V{shape.vocabulary}, widths {widths(shape)}, {shape.kind}"
    if isinstance(shape, Samples):
        return f"N{shape.samples}, widths {widths(shape)}"
    return f"N{shape.samples}, width {shape.width}"


def widths(shape: Shape) -> str:
    return f"{shape.teacher_width} / {shape.student_width}"
