"""How the scores are cut into blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# What it is called; a test of the path for other devices calls it otherwise.
CPU = "cpu"
# Scores in one block. On a CPU three of them and the vectors stay in the caches.
CPU_SCORES = 2**19
CUDA_SCORES = 2**25
CPU_ROWS = 128
# Thin products are slow: a long row gets a larger block rather than fewer rows.
MIN_CPU_ROWS = 32
# A matrix of so few scores is cheaper to keep than to make a second time.
SMALL = 2**22


@dataclass(frozen=True)
class Block:
    heads: slice
    rows: slice
    columns: int
    # Flat, and the same ones for every block.
    buffers: list[Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (
            self.heads.stop - self.heads.start,
            self.rows.stop - self.rows.start,
            self.columns,
        )

    def later(self, like: Tensor) -> Tensor:  # [r, r] bool
        """True where a key of the block's own rows comes after the row."""
        rows = self.shape[1]
        return torch.ones(rows, rows, dtype=torch.bool, device=like.device).triu_(1)


def blocks(
    like: Tensor, heads: int, step: int, rows: int, columns: int, causal: bool = False
) -> Iterator[Block]:
    """Every head and row once, `step` heads or a multiple at a time; where causal, row i reads the
    columns up to i only."""
    if not heads * rows * columns:
        return
    block_heads, block_rows = block_size(like, heads, step, rows, columns)
    buffers = [like.new_empty(block_heads * block_rows * columns) for _ in range(3)]
    for head in range(0, heads, block_heads):
        for row in range(0, rows, block_rows):
            stop = min(row + block_rows, rows)
            yield Block(
                slice(head, min(head + block_heads, heads)),
                slice(row, stop),
                stop if causal else columns,
                buffers,
            )


def block_size(like: Tensor, heads: int, step: int, rows: int, columns: int) -> tuple[int, int]:
    """Heads and rows of a block."""
    budget, most, least = CUDA_SCORES, rows, 1
    if on_cpu(like):
        budget, most, least = CPU_SCORES, CPU_ROWS, MIN_CPU_ROWS
    block_rows = min(rows, most, max(budget // (columns * step), least))
    block_heads = max(budget // (block_rows * columns * step), 1) * step
    return min(heads, block_heads), block_rows


def is_small(rows: int, columns: int) -> bool:
    return rows * columns <= SMALL


def on_cpu(x: Tensor) -> bool:
    """Whether a size that depends on values is known without waiting for a device."""
    return x.device.type == CPU


def shaped(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a contiguous tensor."""
    return buffer[: math.prod(shape)].view(shape)
