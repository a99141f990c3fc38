"""Every kernel in every configuration of _tiles.py, compiled for devices that are not here."""

import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton here")

KERNELS = {
    "relation_forward": "forward",
    "relation_backward": "gram_backward",
    "attention_forward": "forward",
    "attention_query_backward": "query_backward",
    "attention_key_backward": "key_backward",
}
# Bytes of shared memory that a block may use.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# (bytes per element, teacher's width, student's): the widest heads of each row of the table, a
# narrow student, and heads of two parts.
EVERY = [
    (2, 64, 64),
    (2, 64, 16),
    (2, 64, 32),
    (2, 128, 128),
    (2, 96, 40),
    (2, 128, 64),
    (2, 256, 256),
    (2, 192, 160),
    (4, 64, 64),
    (4, 256, 256),
]
# The other two have limits but no promise of no spills.
FEW = [(2, 64, 32), (2, 256, 256), (4, 64, 64)]
WIDTHS = {"sm_80": EVERY, "sm_90": EVERY, "sm_100": FEW, "gfx942": FEW}


def leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def row_kernels() -> list[tuple[str, dict[str, Any]]]:
    """The kernels along rows, with everything optional that takes registers, and without."""
    bare = {"bias": None, "excluded": None}
    found = [("kl_rows", {"CAUSAL": True}), ("kl_slope", {"CAUSAL": True})]
    found += [("kl_rows", {"CAUSAL": False, **bare}), ("kl_slope", {"CAUSAL": False, **bare})]
    for kind in KINDS:
        found.append(("divergence_rows", {"KIND": kind, "labels": None}))
    plain = {"teacher_cap": None, "student_cap": None, "weight": None}
    found.append(("divergence_rows", {"KIND": "forward_kl", "labels": None, **plain}))
    found.append(("divergence_rows", {"KIND": "jsd", "labels": None, "slope": None}))
    alone = {"teacher": None, "teacher_cap": None}
    found.append(("divergence_rows", {"KIND": "cross_entropy", **alone}))
    found += [("contrast", {"SIDE": 0, "grad": None}), ("contrast", {"SIDE": 1, "out": None})]
    return found


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable]:
    """Compiles many in processes of their own: in this one Triton may have been imported to
    interpret. Cases of build's arguments, or of another function's -> its results."""
    context = multiprocessing.get_context("spawn")
    workers = os.cpu_count()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=leave_interpreter) as pool:
        yield lambda cases, by=build: [
            job.result() for job in [pool.submit(by, *case) for case in cases]
        ]


def argument(name: str, element: str) -> str:
    if name.endswith("_scale"):
        return "fp32"
    if name.endswith(("_batch", "_head", "_row", "_group")) or name in ("heads", "length"):
        return "i32"
    if name.endswith("_lse") or name in ("rows", "grad", "unit"):
        return "*fp32"
    return {"keep": "*i1"}.get(name, f"*{element}")


def row_argument(name: str) -> str:
    if name in ("beta", "teacher_cap", "student_cap"):
        return "fp32"
    if name in ("own", "labels", "labels_all"):
        return "*i64"
    if name in ("keep", "keep_all"):
        return "*i1"
    numbers = "rows columns bias_head start excluded vocabulary line first_row samples".split()
    return "i32" if name in numbers else "*fp32"


def build(
    name: str,
    target: str,
    widths: tuple[int, int, int],
    causal: bool,
    element: str | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """A kernel that makes scores, in the tile for such heads."""
    import torch

    from mlkd_kernels.triton import _tiles, attention_map, relation

    size, teacher, student = widths
    element = element or {2: "bf16", 4: "fp32"}[size]
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    tile = _tiles.choose_tile(KERNELS[name], student, teacher, dtype)
    values = {
        "CAUSAL": causal,
        "PAIRED": relation.pairs(student, teacher, causal),
        "STUDENT_WIDTH": student,
        "TEACHER_WIDTH": teacher,
        "OWN": tile.own,
        "OTHER": tile.other,
    }
    values |= {} if element == "fp16" else {"unit": None}
    values |= {} if keep else {"keep": None}
    kernel = getattr(attention_map if "attention" in name else relation, name)
    types = {arg: argument(arg, element) for arg in kernel.arg_names if arg not in values}
    return compile_for(target, kernel, types, values, num_warps=tile.warps, num_stages=tile.stages)


def build_row(name: str, target: str, columns: int, values: dict[str, Any]) -> dict[str, Any]:
    """A kernel that walks along rows of scores."""
    from mlkd_kernels.triton import _tiles, contrastive, divergence, row_kl

    kernel = next(
        getattr(module, name)
        for module in (row_kl, divergence, contrastive)
        if hasattr(module, name)
    )
    tile = _tiles.row_tile(columns)
    values = {**values, "BLOCK": tile.block}
    types = {arg: row_argument(arg) for arg in kernel.arg_names if arg not in values}
    return compile_for(target, kernel, types, values, num_warps=tile.warps)


def compile_for(
    target: str,
    kernel: Any,
    types: dict[str, str],  # argument -> its type as Triton writes it
    values: dict[str, Any],  # argument -> what it is always
    **options: int,
) -> dict[str, Any]:
    """Shared memory, bytes of stack that the registers spill to, and the code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if types.get(arg, "fp32") != "fp32" and arg not in kernel.do_not_specialize
    }
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    values = {arg: value for arg, value in values.items() if arg in signature}
    device = (
        GPUTarget("hip", target, 64)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target[3:]), 32)
    )
    source = ASTSource(kernel, signature, values, aligned)
    result = triton.compile(source, target=device, options=options)
    return {"shared": result.metadata.shared, **usage(result.asm)}


def usage(asm: dict[str, Any]) -> dict[str, Any]:
    if "cubin" not in asm:
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", asm["amdgcn"])
        registers = re.search(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"])
        return {"spilled": int(spilled[1]), "registers": int(registers[1]), "wgmma": 0}
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The kernels have no arrays of their own: all of the stack is registers that were spilled.
    stack, registers = (re.search(rf"{key}:(\d+)", report) for key in ("STACK", "REG"))
    return {
        "spilled": int(stack[1]),
        "registers": int(registers[1]),
        "wgmma": asm["ptx"].count("wgmma.mma_async"),
    }


def check(compiled: Callable, cases: list[tuple]) -> None:
    for case, result in zip(cases, compiled(cases), strict=True):
        _, target, (size, *_), _ = case
        assert result["shared"] <= SHARED[target], (case, result)
        if target in ("sm_80", "sm_90"):
            assert result["spilled"] == 0, (case, result)
        if target == "sm_90" and size == 2:
            # bf16 on Hopper must run on its own matrix instructions.
            assert result["wgmma"] > 0, (case, result)


# The kernel with most registers on the two devices that are asked for most, and each other target
# and kernel once.
SOME = [
    ("relation_backward", "sm_90", (2, 64, 64), False),
    ("relation_backward", "sm_80", (2, 64, 64), False),
    ("relation_backward", "gfx942", (2, 64, 64), True),
    ("relation_forward", "sm_90", (2, 96, 40), False),
    ("relation_forward", "sm_100", (2, 64, 64), True),
    ("attention_forward", "sm_80", (2, 128, 128), True),
    ("attention_query_backward", "sm_90", (2, 128, 128), True),
    ("attention_key_backward", "sm_90", (2, 64, 64), True),
]


def test_some_kernels_compile(compiled: Callable) -> None:
    check(compiled, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles(
    compiled: Callable, name: str, target: str, causal: bool
) -> None:
    check(compiled, [(name, target, widths, causal) for widths in WIDTHS[target]])


ROW_CASES = [
    (name, target, columns, values)
    for target in SHARED
    for name, values in row_kernels()
    for columns in ((4096,) if name == "divergence_rows" else (128, 4096))
]


def check_rows(compiled: Callable, cases: list[tuple]) -> None:
    for case, result in zip(cases, compiled(cases, build_row), strict=True):
        assert result["shared"] <= SHARED[case[1]], (case, result)
        assert result["spilled"] == 0, (case, result)


def test_some_row_kernels_compile(compiled: Callable) -> None:
    """The ones with most registers, on the devices asked for most."""
    most = ("skew_forward_kl", "jsd")
    cases = [c for c in ROW_CASES if c[1] in ("sm_80", "sm_90") and c[3].get("KIND") in most]
    check_rows(compiled, cases)


@pytest.mark.slow
def test_every_row_kernel_compiles(compiled: Callable) -> None:
    check_rows(compiled, ROW_CASES)


@pytest.mark.slow
def test_variants_compile(compiled: Callable) -> None:
    """fp16 with its unit, and no padding."""
    variants = [("fp16", True), ("bf16", False)]
    cases = [
        (name, "sm_90", (2, 64, 32), True, *variant) for name in KERNELS for variant in variants
    ]
    for case, result in zip(cases, compiled(cases), strict=True):
        assert result["spilled"] == 0 and result["wgmma"] > 0, (case, result)
