"""How large the blocks of a kernel are, and what the kernels can do at all."""

import functools
import json
import re
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import triton

from mlkd_kernels._backend import head_lacks


@dataclass(frozen=True)
class Tile:
    own: int  # rows of the block that a program owns
    other: int  # rows of the blocks that it walks over
    warps: int
    stages: int


# What kernels/benchmarks/tune.py found on a device: its name in lower case, words joined by "-".
TUNED = Path(__file__).parent / "tuned"
# kernel -> bytes per element -> rows of (largest padded width of teacher + student, tile)
Table = dict[str, dict[int, list[tuple[int, Tile]]]]
# Every row compiles for sm_80 and sm_90 without spilled registers (tests/test_triton_compile.py);
# 64 rows and more are what Hopper's matrix instructions need. No GPU has timed them yet; a device
# in TUNED has its own.
TILES: Table = {
    "forward": {
        2: [(128, Tile(128, 64, 8, 3)), (256, Tile(128, 64, 8, 2)), (512, Tile(64, 32, 4, 2))],
        4: [(128, Tile(32, 32, 4, 2)), (512, Tile(16, 16, 4, 1))],
    },
    "gram_backward": {
        2: [
            (96, Tile(128, 64, 8, 2)),
            (128, Tile(128, 32, 8, 2)),
            (160, Tile(64, 64, 8, 2)),
            (192, Tile(128, 16, 8, 2)),
            (256, Tile(64, 32, 8, 2)),
            (512, Tile(64, 16, 8, 2)),
        ],
        4: [(128, Tile(32, 16, 4, 2)), (512, Tile(16, 16, 8, 1))],
    },
    "query_backward": {
        2: [(128, Tile(128, 32, 8, 2)), (256, Tile(64, 32, 8, 2)), (512, Tile(64, 16, 8, 3))],
        4: [(128, Tile(32, 16, 4, 2)), (512, Tile(16, 16, 4, 1))],
    },
    "key_backward": {
        2: [(128, Tile(128, 32, 8, 2)), (256, Tile(64, 32, 8, 2)), (512, Tile(64, 16, 8, 2))],
        4: [(128, Tile(32, 16, 4, 2)), (512, Tile(16, 16, 4, 1))],
    },
}


# Columns: two rows of them and what is made of them lie in the registers of eight warps.
WIDEST_ROW = 4096


@dataclass(frozen=True)
class RowTile:
    block: int  # columns of a row that a program holds at a time
    warps: int


def row_tile(columns: int) -> RowTile:
    """For kernels that walk along rows: a short row fits one block, a warp takes 256 columns."""
    block = min(max(triton.next_power_of_2(columns), 32), WIDEST_ROW)
    return RowTile(block, min(max(block // 256, 1), 8))


# A head's width is held in two parts whose sizes are powers of two, the second perhaps 0: 96 is
# 64 + 32 and not 128. No part is below 16, the least that tensor cores multiply.
@triton.constexpr_function
def tail_part(width: int) -> int:
    head = 1 << ((max(width, 2) - 1).bit_length() - 1)
    tail = max(16, 1 << max(width - head - 1, 0).bit_length())
    return tail if tail < head else 0


@triton.constexpr_function
def head_part(width: int) -> int:
    whole = max(16, 1 << (width - 1).bit_length())
    return whole // 2 if tail_part(width) else whole


def padded(width: int) -> int:
    return head_part(width) + tail_part(width)


def check_supported(student_width: int, teacher_width: int, *dtypes: torch.dtype) -> None:
    lacks = head_lacks(student_width, teacher_width, *dtypes)
    if lacks is not None:
        raise NotImplementedError(
            f"heads of widths {student_width} and {teacher_width} in {set(dtypes)}: {lacks}. Use "
            f"backend='streamed'."
        )


def choose_tile(
    kernel: str,
    student_width: int,
    teacher_width: int,
    *dtypes: torch.dtype,
    device: torch.device | None = None,
) -> Tile:
    """The tile for heads of these widths; the widest of the types decides."""
    total = padded(student_width) + padded(teacher_width)
    table = tiles_of(device)[kernel][max(dtype.itemsize for dtype in dtypes)]
    return next(tile for limit, tile in table if total <= limit)


def tiles_of(device: torch.device | None) -> Table:
    if device is None or device.type != "cuda":
        return TILES
    return tuned(torch.cuda.get_device_name(device)) or TILES


@functools.cache
def tuned(device: str) -> Table | None:
    path = tuned_path(device)
    return read(path) if path.exists() else None


def tuned_path(device: str) -> Path:
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read(path: Path) -> Table:
    return {
        kernel: {
            int(size): [(limit, Tile(*tile)) for limit, *tile in rows]
            for size, rows in sizes.items()
        }
        for kernel, sizes in json.loads(path.read_text()).items()
    }


def write(table: Table, path: Path) -> None:
    """One line per row: limit, own, other, warps, stages."""
    found = {
        kernel: {
            str(size): [[limit, *astuple(tile)] for limit, tile in rows]
            for size, rows in sizes.items()
        }
        for kernel, sizes in table.items()
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
