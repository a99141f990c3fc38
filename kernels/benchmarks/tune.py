"""Times candidate tiles of the Triton kernels for each class of widths and writes the winners.

    python kernels/benchmarks/tune.py --out FOLDER [--resume]

Every candidate goes to tiles.csv and the winners to <device>.json, which takes effect in
mlkd_kernels/triton/tuned. Many are compiled at a time and timed one after the other. A candidate
whose result is not that of the shipped tile is refused.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_attention_kl
import bench_linear_divergence
import bench_relation_kl
import measure
import results
import torch
from harness import UNFINISHED
from operation import errors, run
from shapes import Attention, Heads, Relation

from mlkd_kernels.triton import _tiles

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# The widths of teacher and student that stand for a class: its limit is their padded sum.
WIDTHS = {96: (64, 32), 128: (64, 64), 160: (128, 32), 192: (128, 64), 256: (128, 128)}
# kernel -> operation, and which of its inputs get gradients; None where the forward is timed
KERNELS: dict[str, tuple[Any, list[bool] | None]] = {
    "forward": (bench_relation_kl.RELATION_KL, None),
    "gram_backward": (bench_relation_kl.RELATION_KL, [True]),
    "query_backward": (bench_attention_kl.ATTENTION_KL, [True, False]),
    "key_backward": (bench_attention_kl.ATTENTION_KL, [False, True]),
}
# bytes per element -> own rows, other rows, warps, stages
CANDIDATES = {
    2: ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    4: ((16, 32, 64), (16, 32, 64), (4, 8), (1, 2)),
}
ROW_BLOCKS = (1024, 2048, 4096, 8192, 16384)
WRONG = 2e-2
COLUMNS = (
    *("date", "commit", "device", "threads", "torch", "triton"),
    *("kernel", "size", "limit", "own", "other", "warps", "stages", "shipped", "ms", "why"),
)
KEY = ("kernel", "size", "limit", "own", "other", "warps", "stages")


class Class(NamedTuple):
    kernel: str
    size: int
    place: int  # in the table of the kernel and size
    limit: int

    def shape(self, length: int, batch: int) -> Relation | Attention:
        teacher, student = WIDTHS.get(self.limit, (self.limit // 2,) * 2)
        heads = 12 if length > 100 else 1
        if KERNELS[self.kernel][0].name == "relation_kl":
            return Relation(batch, length, heads, teacher, student)
        return Attention(batch, length, heads, heads, heads, teacher, student)

    def shipped(self) -> _tiles.Tile:
        return SHIPPED[self.kernel][self.size][self.place][1]

    def row(self, tile: _tiles.Tile) -> results.Row:
        own = {"kernel": self.kernel, "size": self.size, "limit": self.limit}
        return own | dataclasses.asdict(tile) | {"shipped": tile == self.shipped()}

    def use(self, tile: _tiles.Tile) -> None:
        IN_USE[self.kernel][self.size][self.place] = (self.limit, tile)

    def candidates(self) -> list[_tiles.Tile]:
        """The shipped one first."""
        tiles = [_tiles.Tile(*each) for each in itertools.product(*CANDIDATES[self.size])]
        return [self.shipped(), *(tile for tile in tiles if tile != self.shipped())]


SHIPPED: _tiles.Table = _tiles.tiles_of(
    torch.device("cuda", 0) if torch.cuda.is_available() else None
)
# What is in use while candidates are timed.
IN_USE = {name: {size: list(rows) for size, rows in of.items()} for name, of in SHIPPED.items()}
_tiles.tiles_of = lambda _: IN_USE


def classes(sizes: list[int]) -> Iterator[Class]:
    """What training runs in first: the gradient in 16 bit."""
    names = sorted(SHIPPED, key=lambda name: name != "gram_backward")
    for size, name in itertools.product(sizes, names):
        if name not in KERNELS:
            print(f"{name}: no way to time it is known here; it keeps its tiles")
            continue
        for place, (limit, _) in enumerate(SHIPPED[name][size]):
            yield Class(name, size, place, limit)


def launches(which: Class, device: str, length: int, batch: int) -> Callable[[], list]:
    """A call of the kernel; the forward that a backward needs is done before."""
    operation, gradients = KERNELS[which.kernel]
    shape = which.shape(length, batch)
    own, other = operation.given(shape, DTYPES[which.size], device)
    function = operation.ours(shape, "triton")
    if gradients is None:
        with torch.no_grad():
            return lambda: [function(*(x.detach() for x in own), *other)]
    leaves = [x for x, wanted in zip(own, gradients, strict=True) if wanted]
    for x, wanted in zip(own, gradients, strict=True):
        x.requires_grad_(wanted)
    value = function(*own, *other)
    upstream = torch.linspace(-1, 2, value.numel(), device=device).view_as(value)
    return lambda: list(torch.autograd.grad(value, leaves, upstream, retain_graph=True))


def compiled(which: Class, tile: _tiles.Tile, length: int) -> str | None:
    """What went wrong. Compiles into Triton's cache, which all processes share."""
    which.use(tile)
    try:
        launches(which, "cuda", length, 1)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return None


def timed(which: Class, tile: _tiles.Tile, expected: list, options: argparse.Namespace) -> dict:
    """Its milliseconds, or why it has none."""
    which.use(which.shipped())
    call = launches(which, options.device, options.length, options.batch)
    which.use(tile)
    value, gradient = errors(call() * 2, expected * 2)
    if not max(value, gradient) < WRONG:
        return {"why": f"wrong: off by {max(value, gradient):.1e}"}
    return {"ms": f"{measure.times(call, options.device, options.seconds).p50:.4f}"}


def pending(which: Class, options: argparse.Namespace) -> list[_tiles.Tile]:
    done = {key(row) for row in results.of_this_commit(options.csv)}
    tiles = which.candidates()[: options.most]
    return [tile for tile in tiles if key(which.row(tile)) not in done]


def faults(wanted: list[tuple[Class, _tiles.Tile]], length: int) -> dict:
    """What does not compile, and why."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 12), mp_context=context) as pool:
        jobs = [pool.submit(compiled, *each, length) for each in wanted]
        return dict(zip(wanted, (job.result() for job in jobs), strict=True))


def row_blocks(options: argparse.Namespace) -> None:
    """The kernels that walk along rows have one block for all; what others would take."""
    if options.device == "cpu":
        heads = Heads(20, 300, 48, 32)
    else:
        heads = Heads(1024, 128256, 1024, 1024)
    operation, shipped = bench_linear_divergence.LINEAR_DIVERGENCE, _tiles.WIDEST_ROW
    for block in dict.fromkeys((shipped, *ROW_BLOCKS)):
        _tiles.WIDEST_ROW = block
        tile = _tiles.row_tile(heads.vocabulary)
        row = results.machine(options.device) | {
            "kernel": "rows of linear_divergence",
            "size": 2,
            "limit": heads.vocabulary,
            "own": 1,
            "other": tile.block,
            "warps": tile.warps,
            "stages": 1,
            "shipped": block == shipped,
        }
        if key(row) in {key(each) for each in results.of_this_commit(options.csv)}:
            continue
        if time.monotonic() > options.end:
            sys.exit(UNFINISHED)
        given = operation.given(heads, DTYPES[2 if options.device == "cuda" else 4], options.device)
        function = operation.ours(heads, "triton")
        times = measure.times(partial(run, function, given), options.device, options.seconds)
        results.append(options.csv, [row | {"ms": f"{times.p50:.4f}"}], COLUMNS)
    _tiles.WIDEST_ROW = shipped


def write_winners(options: argparse.Namespace) -> None:
    """As mlkd_kernels/triton/_tiles.py reads it from its folder `tuned`; what was not timed keeps
    its tile."""
    table = {name: {size: list(rows) for size, rows in of.items()} for name, of in SHIPPED.items()}
    rows = [row for row in results.of_this_commit(options.csv) if row["ms"]]
    # The fastest comes last and stays.
    for row in sorted(rows, key=lambda row: -float(row["ms"])):
        here = table.get(row["kernel"], {}).get(int(row["size"]), [])
        for place, (limit, _) in enumerate(here):
            if str(limit) == row["limit"]:
                here[place] = (limit, _tiles.Tile(*(int(row[name]) for name in KEY[3:])))
    name = _tiles.tuned_path(results.machine(options.device)["device"]).name
    _tiles.write(table, options.out / name)


def key(row: results.Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--kernels", nargs="+", default=list(KERNELS))
    add("--sizes", nargs="+", type=int, default=[2], help="bytes per element")
    add("--length", type=int, default=2048)
    add("--batch", type=int, default=4)
    add("--most", type=int, default=1000, help="candidates of a class")
    add("--seconds", type=float, default=0.05, help="of timing, per candidate")
    add("--out", type=Path, default=Path("."), help="folder")
    add("--resume", action="store_true", help="leave out what tiles.csv has of this commit")
    add("--budget", type=float, default=1e9, help="seconds after which no candidate begins")
    options = parser.parse_args()
    options.end = time.monotonic() + options.budget
    options.csv = options.out / "tiles.csv"
    if not options.resume:
        options.csv.unlink(missing_ok=True)
    wanted = [
        (which, tile)
        for which in classes(options.sizes)
        if which.kernel in options.kernels
        for tile in pending(which, options)
    ]
    why = faults(wanted, options.length) if options.device == "cuda" and wanted else {}
    for which, group in itertools.groupby(wanted, key=lambda each: each[0]):
        which.use(which.shipped())
        expected = launches(which, options.device, options.length, options.batch)()
        for each in group:
            if time.monotonic() > options.end:
                sys.exit(UNFINISHED)
            fault = why.get(each)
            found = {"why": fault} if fault else timed(*each, expected, options)
            row = results.machine(options.device) | which.row(each[1]) | found
            results.append(options.csv, [row], COLUMNS)
        which.use(which.shipped())
        write_winners(options)
    if 2 in options.sizes:
        row_blocks(options)


if __name__ == "__main__":
    main()
