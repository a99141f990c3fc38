"""Every Triton kernel against float64 of the same inputs, where plain PyTorch in fp32 stands too.

    python kernels/benchmarks/parity.py [--device cuda] [--out parity.csv] [--resume]

The hard cases: scores of a standard deviation of 3, 10 and 30, students that are their teacher but
for 3 %, padding in the middle and at both ends. A second run must give the same bits. Ends with 1
where a kernel is wrong. On a CPU it is Triton's interpreter that runs (TRITON_INTERPRET=1), at
sizes that only try the code, and without bf16, whose products it gets wrong.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import results
import torch
from harness import FAILED, FAULTS, UNFINISHED
from operation import DTYPES, Given, errors, is_refusal, run
from torch import Tensor

import mlkd_kernels

SPREADS = (1.0, 3.0, 10.0, 30.0)
NOISE = 0.03
# What a kernel may add to twice the error of fp32 scores: in 16 bit it rounds the gradient of the
# scores before it multiplies by the student's rows, and the gradient itself.
FLOORS = {"fp32": (1e-5, 1e-5), "fp16": (1e-5, 3e-4), "bf16": (1e-5, 1e-3)}
# Never more, where the divergence is above 1e-3.
CAPS = {"fp32": (1e-4, 1e-3), "fp16": (1e-4, 2e-3), "bf16": (1e-4, 5e-3)}
SMALL_VALUE = 1e-3
EPSILON = torch.finfo(torch.float32).eps
KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
ABSENT = "no kernel"
GOOD = ("ok", ABSENT)
COLUMNS = (
    *("date", "commit", "device", "threads", "torch", "triton"),
    *("op", "case", "spread", "student", "dtype", "value"),
    *("value_error", "gradient_error", "fp32_value_error", "fp32_gradient_error"),
    *("repeatable", "result", "seconds"),
)
KEY = ("op", "case", "spread", "student", "dtype")


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

        def make(randn: Callable, teacher=teacher, student=student, number=number) -> Given:
            one, two = pair(
                lambda width: randn(batch, length, number * width) * spread**0.5,
                (student, teacher), near, randn,
            )  # fmt: skip
            return [one], [two]

        name = f"relation_kl {number} of {teacher}/{student}{described(causal, padding)}"
        mask = partial(kept, padding, batch, length)
        # Of a token with itself.
        largest = spread * student**0.5
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

            query, other_query = pair(draw(count), widths, near, randn)
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
        one, two = pair(lambda width: randn(number, width), widths, near, randn)
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
    draw: Callable[[int], Tensor], widths: tuple[int, int], near: bool, randn: Callable
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


def judged(case: Case, dtype: str, device: str) -> results.Row:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    own, other = ([x.to(DTYPES[dtype]) for x in group] for group in case.make(draw))
    own = [x.requires_grad_() for x in own]
    found, again = (run(case.function("triton"), (own, other)) for _ in range(2))
    fp32 = run(case.function("eager"), (own, other))
    wide = [x.detach().double().requires_grad_() for x in own], [x.double() for x in other]
    expected = run(case.function("eager"), wide)
    # What the gradient is where student and teacher have nothing in common.
    apart = run(case.function("eager"), (wide[0], [torch.zeros_like(x) for x in wide[1]]))
    mine, best = errors(found, expected), errors(fp32, expected)
    allowed = bounds(best, expected, apart, dtype, case.largest)
    same = all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    words = [
        f"{name} off by {error:.1e}, allowed {most:.1e}"
        for name, error, most in zip(("value", "gradient"), mine, allowed, strict=True)
        if not error <= most
    ]
    words += [] if same else ["not the same bits twice"]
    return {
        "value": f"{expected[0].abs().mean().item():.1e}",
        "value_error": f"{mine[0]:.1e}",
        "gradient_error": f"{mine[1]:.1e}",
        "fp32_value_error": f"{best[0]:.1e}",
        "fp32_gradient_error": f"{best[1]:.1e}",
        "repeatable": same,
        "result": "; ".join(words) or "ok",
    }


def bounds(
    best: tuple[float, float],
    expected: list[Tensor],
    apart: list[Tensor],
    dtype: str,
    largest: float,
) -> list[float]:
    """Relative errors that value and gradient may have."""
    allowed = []
    large = expected[0].abs().mean() > SMALL_VALUE
    for reference, floor, cap in zip(best, FLOORS[dtype], CAPS[dtype], strict=True):
        most = 2 * reference + floor
        allowed.append(min(most, max(cap, reference)) if large else most)
    # A probability is as exact as the score that it is the exponential of.
    size = expected[0].norm() / expected[0].numel() ** 0.5
    allowed[0] += (4 * EPSILON / size).item()
    gradients = zip(apart[1:], expected[1:], strict=True)
    allowed[1] += max(8 * EPSILON * largest * (a.norm() / b.norm()).item() for a, b in gradients)
    return allowed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--ops", nargs="+", help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: all that the device computes")
    add("--spreads", nargs="+", type=float, default=SPREADS)
    add("--out", type=Path, default=Path("parity.csv"))
    add("--resume", action="store_true", help="leave out what the CSV has of this commit")
    add("--budget", type=float, default=1e9, help="seconds after which no case begins")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    on_gpu = options.device == "cuda"
    dtypes = options.dtypes or (["bf16", "fp32", "fp16"] if on_gpu else ["fp32", "fp16"])
    earlier = results.of_this_commit(options.out) if options.resume else []
    done = {key(row): row["result"] for row in earlier}
    wrong = sum(result not in GOOD for result in done.values())
    for case in cases(GPU if on_gpu else INTERPRETER, options.spreads):
        for dtype in dtypes:
            row = results.machine(options.device) | {
                "op": case.op,
                "case": case.name,
                "spread": case.spread,
                "student": "near" if case.near else "far",
                "dtype": dtype,
            }
            if key(row) in done or (options.ops and case.op not in options.ops):
                continue
            if time.monotonic() > end:
                sys.exit(UNFINISHED)
            begin = time.monotonic()
            try:
                row |= judged(case, dtype, options.device)
            except Exception as error:
                if is_refusal(error):
                    row["result"] = ABSENT
                else:
                    # Written down before it ends the run: a device may compute no more.
                    row["result"] = f"{FAILED}: {error!r}"[:200]
                    results.append(options.out, [row], COLUMNS)
                    raise
            row["seconds"] = f"{time.monotonic() - begin:.1f}"
            results.append(options.out, [row], COLUMNS)
            if row["result"] not in GOOD:
                wrong += 1
                print(*key(row), row["result"], flush=True)
    print(f"{wrong} of the kernels' results are wrong", flush=True)
    sys.exit(FAULTS if wrong else 0)


def key(row: results.Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


if __name__ == "__main__":
    main()
