"""What parity.py tries: the hard inputs of every operation that has a Triton kernel."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from operation import Given
from torch import Tensor

import mlkd_kernels

NOISE = 0.03
RANK = 4
KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


class Sizes(NamedTuple):
    batch: int
    length: int
    heads: int
    rows: int
    vocabulary: int
    samples: int


GPU = Sizes(2, 1000, 4, 500, 32003, 2500)
INTERPRETER = Sizes(1, 40, 2, 20, 90, 30)


class Case(NamedTuple):
    op: str
    name: str
    near: bool
    spread: float
    function: Callable[..., Tensor]  # takes a backend
    make: Callable[[Callable[..., Tensor]], Given]
    largest: float  # score


def cases(sizes: Sizes, spreads: Iterable[float]) -> Iterator[Case]:
    for near, spread in itertools.product((False, True), spreads):
        for group in (relations, attentions, heads, samples):
            for name, *rest in group(sizes, near, spread):
                op, _, name = name.partition(" ")
                yield Case(op, name, near, spread, *rest)


def relations(sizes: Sizes, near: bool, spread: float) -> Iterator[tuple]:
    batch, length, count, *_ = sizes
    for widths, causal, padding in (
        ((16, 16), False, None),
        ((64, 32), False, None),
        ((64, 64), True, "left"),
        ((128, 64), True, "holes"),
        ((96, 40), False, "holes"),
        ((1024, 768), False, "right"),
    ):
        teacher, student = (widths[0],) * 2 if near else widths
        number = count if teacher < 512 else 1
        options = {"heads": number, "causal": causal}

        def make(randn: Callable, number=number, widths=(student, teacher)) -> Given:
            def draw(width: int) -> Tensor:
                # Of few dimensions, as trained ones are: a token of as many dimensions as its width
                # would be so much more like itself than like others that its row has one entry.
                tokens = randn(batch, length, number, 1, RANK) @ randn(number, RANK, width)
                return (tokens * (spread * (RANK * width) ** -0.5) ** 0.5).flatten(2)

            one, two = pair(draw, widths, near)
            return [one], [two]

        name = f"relation_kl {number} of {teacher}/{student}{described(causal, padding)}"
        mask = partial(kept, padding, batch, length)
        # Of a token with itself.
        largest = spread * RANK**0.5
        yield name, masked(mlkd_kernels.relation_kl, mask, **options), make, largest


def attentions(sizes: Sizes, near: bool, spread: float) -> Iterator[tuple]:
    batch, length, count, *_ = sizes
    for widths, keys, causal, padding in (
        ((64, 32), (count, count), False, None),
        ((128, 64), (count, count // 2), True, "left"),
        ((64, 64), (count // 2, 1), False, "holes"),
    ):
        teacher, student = (widths[0],) * 2 if near else widths
        groups = (keys[0],) * 2 if near else keys

        def make(randn: Callable, widths=(student, teacher), groups=groups) -> Given:
            def draw(heads: int) -> Callable[[int], Tensor]:
                return lambda width: (
                    randn(batch, length, heads, width).transpose(1, 2) * spread**0.5
                )

            query, other_query = pair(draw(count), widths, near)
            key, other_key = (draw(heads)(w) for heads, w in zip(groups[::-1], widths, strict=True))
            if near:
                key = other_key + NOISE * spread**0.5 * randn(*other_key.shape)
            return [query, key], [other_query, other_key]

        name = f"attention_kl {count}:{groups[0]}/{groups[1]} of {teacher}/{student}"
        mask = partial(kept, padding, batch, length)
        function = masked(mlkd_kernels.attention_kl, mask, causal=causal)
        yield name + described(causal, padding), function, make, 4 * spread


def heads(sizes: Sizes, near: bool, spread: float) -> Iterator[tuple]:
    rows, vocabulary = sizes.rows, sizes.vocabulary
    teacher, student = (384, 384 if near else 256) if rows > 100 else (48, 48 if near else 32)

    def make(randn: Callable) -> Given:
        weights = [spread * randn(vocabulary, w) * w**-0.5 for w in (student, teacher)]
        hidden = randn(rows, student), randn(rows, teacher)
        if near:
            weights[0] = weights[1].clone()
            hidden = hidden[1] + NOISE * randn(rows, student), hidden[1]
        return [hidden[0], weights[0]], [hidden[1], weights[1]]

    for kind in KINDS:
        yield (
            f"linear_divergence {kind}",
            lambda backend, kind=kind: partial(
                mlkd_kernels.linear_divergence, kind=kind, backend=backend
            ),
            make,
            4 * spread,
        )

    def labelled(backend: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
            labels = (torch.arange(rows, device=x.device) * 7919) % vocabulary
            labels[::5] = -100
            return mlkd_kernels.linear_divergence(
                x, weight, None, None, kind="cross_entropy", labels=labels, backend=backend
            )

        return run

    if not near:
        yield "linear_divergence cross_entropy", labelled, make, 4 * spread


def samples(sizes: Sizes, near: bool, spread: float) -> Iterator[tuple]:
    number = sizes.samples
    wide = 768 if number > 100 else 64
    # Cosines spread by 1 / sqrt(width).
    temperature = 1 / (spread * math.sqrt(wide))

    def make(widths: tuple[int, int], randn: Callable) -> Given:
        one, two = pair(lambda width: randn(number, width), widths, near)
        return [one], [two]

    widths = wide, wide if near else wide * 4 // 3
    for diagonal in (True, False):
        yield (
            f"similarity_kl {widths[1]}/{widths[0]}" + ", no diagonal" * (not diagonal),
            lambda backend, diagonal=diagonal: partial(
                mlkd_kernels.similarity_kl,
                temperature=temperature,
                diagonal=diagonal,
                backend=backend,
            ),
            partial(make, widths),
            1 / temperature,
        )
    yield (
        f"info_nce {wide}",
        lambda backend: partial(mlkd_kernels.info_nce, temperature=temperature, backend=backend),
        partial(make, (wide, wide)),
        1 / temperature,
    )


def pair(
    draw: Callable[[int], Tensor], widths: tuple[int, int], near: bool
) -> tuple[Tensor, Tensor]:
    """Student and teacher; a near student is its teacher but for a little noise."""
    teacher = draw(widths[1])
    return (teacher + NOISE * draw(widths[1]) if near else draw(widths[0])), teacher


def masked(
    operation: Callable[..., Tensor], mask: Callable[[torch.device], Tensor | None], **options: bool
) -> Callable[[str], Callable[..., Tensor]]:
    return lambda backend: (
        lambda *given: operation(*given, mask=mask(given[0].device), backend=backend, **options)
    )


def kept(padding: str | None, batch: int, length: int, device: torch.device) -> Tensor | None:
    if padding is None:
        return None
    keep = torch.ones(batch, length, dtype=torch.bool, device=device)
    if padding == "right":
        keep[0, length // 2 :] = False
    if padding == "left":
        keep[0, : length // 2] = False
    if padding == "holes":
        keep[0, length // 4 : length // 2] = False
        keep[-1, ::3] = False
    return keep


def described(causal: bool, padding: str | None) -> str:
    return ", causal" * causal + (f", {padding} padding" if padding else "")
