"""Each benchmark tries its first cases, what is wrong is refused, and the tables of the README are
those of the committed measurements."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

BENCHMARKS = ROOT / "kernels" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_session  # noqa: E402
import harness  # noqa: E402
import measure  # noqa: E402
import operation  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import roofs  # noqa: E402
import shapes  # noqa: E402
from bench_attention_kl import ATTENTION_KL  # noqa: E402
from bench_info_nce import INFO_NCE  # noqa: E402
from bench_linear_divergence import LINEAR_DIVERGENCE  # noqa: E402
from bench_relation_kl import RELATION_KL, RELATION_KL_SUM  # noqa: E402
from bench_similarity import SIMILARITY_KL, SIMILARITY_MSE  # noqa: E402

OPERATIONS = [
    RELATION_KL,
    RELATION_KL_SUM,
    ATTENTION_KL,
    LINEAR_DIVERGENCE,
    SIMILARITY_KL,
    SIMILARITY_MSE,
    INFO_NCE,
]
# All but torch.compile, which takes half a minute a case.
QUICK = ["eager", "plain", "streamed", "auto", "attention calls", "torch linear_cross_entropy"]


def bench(
    monkeypatch: pytest.MonkeyPatch, out: Path, which: operation.Operation, *arguments: str
) -> list[dict[str, str]]:
    """The rows of one call of a bench_<op>.py."""
    command = ["bench.py", "--device", "cpu", "--out", str(out), "--seconds", "0.001", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    harness.main(which)
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_registry() -> None:
    assert set(shapes.SHAPES) == {each.name for each in OPERATIONS}
    for each in OPERATIONS:
        assert len(each.cases) == sum(map(len, shapes.SHAPES[each.name].values())), each.name


@pytest.mark.parametrize("which", OPERATIONS, ids=lambda each: each.name)
def test_first_case_of_each_device(
    which: operation.Operation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [next(iter(cases)) for cases in shapes.SHAPES[which.name].values() if cases]
    if which is LINEAR_DIVERGENCE:
        wanted.append("llama3-cross-entropy")
    arguments = ["--tiny", "--no-memory", "--cases", *wanted, "--backends", *QUICK]
    rows = bench(monkeypatch, tmp_path / "rows.csv", which, *arguments)
    assert {row["case"] for row in rows} == set(wanted)
    assert {row["direction"] for row in rows} == {harness.FORWARD, harness.BOTH}
    ours = "auto" if which is SIMILARITY_MSE else "streamed"
    assert {"eager", "plain", ours} <= {row["backend"] for row in rows}
    for row in rows:
        assert tuple(row) == results.COLUMNS
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["value_error"]) < 1e-3 and float(row["gradient_error"]) < 1e-3
        assert float(row["mma_tflops"]) > 0 and row["commit"] and row["device"]
        # No roofs are known of this processor.
        assert row["roof"] == row["roof_share"] == ""


def test_resumes_and_measures_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLKD_COMMIT", "one")
    results.commit.cache_clear()
    results.machine.cache_clear()
    out, case = tmp_path / "rows.csv", ("--tiny", "--cases", "short", "--resume")
    monkeypatch.setattr(measure, "in_fresh_process", lambda *_: ["1.5", measure.OOM])
    rows = bench(monkeypatch, out, RELATION_KL, *case, "--backends", "eager")
    assert [row["extra_peak_mib"] for row in rows] == ["1.5", measure.OOM]
    assert float(rows[0]["ms_p50"]) > 0 and rows[1]["ms_p50"] == measure.OOM
    assert bench(monkeypatch, out, RELATION_KL, *case, "--backends", "eager") == rows
    more = bench(monkeypatch, out, RELATION_KL, *case, "--backends", "eager", "streamed")
    assert [row["backend"] for row in more] == ["eager"] * 2 + ["streamed"] * 2
    monkeypatch.setenv("MLKD_COMMIT", "two")
    results.commit.cache_clear()
    results.machine.cache_clear()
    again = bench(monkeypatch, out, RELATION_KL, *case, "--backends", "eager")
    assert [row["commit"] for row in again[4:]] == ["two", "two"]


@pytest.fixture(autouse=True)
def fresh_commit() -> None:
    results.commit.cache_clear()
    results.machine.cache_clear()


def test_memory_of_a_fresh_process() -> None:
    script = f"""if True:
        import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
        import measure, torch
        torch.ones(2)
        print(measure.cpu_extra_mib(lambda: torch.ones(2**24)))
        measure.limit_memory(100)
        try:
            torch.ones(2**26)
        except Exception as error:
            print(measure.out_of_memory(error))
    """
    process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    extra, refused = process.stdout.split()
    assert 60 < float(extra) < 80 and refused == b"True"


def test_what_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shape: shapes.Relation, backend: str):
        right = RELATION_KL_OURS(shape, backend)
        return right if backend == "eager" else lambda *given: right(*given) * 1.001

    RELATION_KL_OURS = RELATION_KL.ours
    broken = operation.Operation(
        "relation_kl", RELATION_KL.inputs, wrong, RELATION_KL.plain, RELATION_KL.work
    )
    out = tmp_path / "rows.csv"
    arguments = ("--tiny", "--no-memory", "--cases", "short", "--backends", "streamed")
    with pytest.raises(SystemExit, match="its value is off by 1.0e-03"):
        bench(monkeypatch, out, broken, *arguments)
    rows = results.read(out)
    assert [row["ms_p50"] for row in rows] == [harness.REFUSED] * 2
    # A session goes on with what follows.
    assert bench(monkeypatch, out, broken, *arguments, "--resume") == rows


def test_rates_and_roofs() -> None:
    shape = shapes.Relation(16, 512, 12, 64, 32)
    parts = RELATION_KL.work(shape, 2)
    count = 16 * 12 * 512**2
    assert [part.flops for part in parts] == [2 * count * 96, 2 * count * (96 + 32)]
    assert [part.exps for part in parts] == [2 * count] * 2
    row = roofs.rates(parts, 1e-3, torch.bfloat16, "NVIDIA H200")
    assert row["roof"] == "exps" and float(row["roof_share"]) == pytest.approx(
        4 * count / 3.4e12 / 1e-3, abs=1e-3
    )
    assert float(row["exps_per_s"]) == pytest.approx(4 * count / 1e-3, rel=1e-2)
    causal = RELATION_KL.work(shape._replace(causal=True), 2)
    assert causal[0].flops == parts[0].flops / 2 and causal[1] == parts[1]
    heads = LINEAR_DIVERGENCE.work(shapes.Heads(8192, 128256, 4096, 2048), 2)
    assert sum(part.flops for part in heads) == 2 * 8192 * 128256 * (4096 + 3 * 2048)


def test_readme_is_the_report_of_the_committed_rows() -> None:
    paths = sorted(results.FOLDER.glob("*.csv"))
    assert paths
    made = report.text(results.read(*paths))
    assert report.inserted(report.README.read_text(), made) == report.README.read_text()
    assert made.count("| --- |") >= 2
    for row in results.read(*paths):
        assert tuple(row) == results.COLUMNS
        assert row["case"] in next(e for e in OPERATIONS if e.name == row["op"]).cases


def test_session_goes_on_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = gpu_session.benchmark("K1-a", "relation_kl", "short", 60)
    options = gpu_session.argparse.Namespace(out=tmp_path, dry_run=True)
    answers = iter([1, gpu_session.UNFINISHED, 1, 1])
    written = iter([3, 2, 0, 0])

    def ran(*_) -> int:
        with (tmp_path / step.writes).open("a") as file:
            file.write("row\n" * next(written))
        return next(answers)

    monkeypatch.setattr(gpu_session, "ran", ran)
    assert gpu_session.advanced(step, "c", gpu_session.time.monotonic() + 100, options) == 1
    lines = (tmp_path / gpu_session.RECORD).read_text().splitlines()
    assert [json.loads(line)["rows"] for line in lines] == [3, 2, 0, 0]
    # At another commit it is begun again; with little time left it is not.
    assert gpu_session.advanced(step, "d", gpu_session.time.monotonic() + 10, options) == 75
    monkeypatch.setattr(gpu_session, "ran", lambda *_: 0)
    assert gpu_session.advanced(step, "d", gpu_session.time.monotonic() + 100, options) == 0
    monkeypatch.setattr(gpu_session, "ran", lambda *_: 1 / 0)
    assert gpu_session.advanced(step, "d", gpu_session.time.monotonic() + 100, options) == 0


@pytest.mark.slow
def test_dry_run_of_a_session(tmp_path: Path) -> None:
    """In Triton's interpreter: each call does what its budget lets it, until all is done."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--dry-run", "--out"]
    command += [str(tmp_path), "--only", "tiles", "K5", "--budget", "90"]
    codes = [subprocess.run(command).returncode]
    while codes[-1] == gpu_session.UNFINISHED and len(codes) < 6:
        codes.append(subprocess.run(command).returncode)
    assert codes[-1] == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert results.read(tmp_path / "benchmarks.csv")
    from mlkd_kernels.triton import _tiles

    (winners,) = tmp_path.glob("*.json")
    for kernel, sizes in _tiles.read(winners).items():
        for size, rows in sizes.items():
            limits = [limit for limit, _ in _tiles.TILES[kernel][size]]
            assert [limit for limit, _ in rows] == limits
    assert {row["kernel"] for row in results.read(tmp_path / "tiles.csv")} > set(_tiles.TILES)


@pytest.mark.slow
def test_parity_of_the_interpreted_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out, environment = tmp_path / "parity.csv", os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(BENCHMARKS / "parity.py"), "--device", "cpu", "--out", str(out)]
    command += ["--spreads", "3", "--dtypes", "fp32", "--resume", "--ops"]
    ops = "similarity_kl", "info_nce"
    done = subprocess.run([*command, *ops], env=environment, stdout=subprocess.PIPE, text=True)
    rows = results.read(out)
    assert done.returncode == 0, done.stdout
    assert {row["result"] for row in rows} == {"ok"} and {row["op"] for row in rows} == set(ops)
    # What is wrong is said, and stays said: at this commit nothing is tried again.
    results.append(out, [rows[0] | {"dtype": "fp16", "result": "value off"}], tuple(rows[0]))
    command[command.index("--dtypes") + 1] = "fp16"
    again = subprocess.run([*command, rows[0]["op"], "--budget", "0"], env=environment)
    assert again.returncode == gpu_session.UNFINISHED and len(results.read(out)) == len(rows) + 1


def test_every_benchmark_of_a_session_exists() -> None:
    benches = {f"bench_{name}.py": names for name, names in {
        "relation_kl": ["relation_kl", "relation_kl_sum"],
        "attention_kl": ["attention_kl"],
        "linear_divergence": ["linear_divergence"],
        "similarity": ["similarity_kl", "similarity_mse"],
        "info_nce": ["info_nce"],
    }.items()}  # fmt: skip
    measured = set()
    for step in gpu_session.STEPS:
        assert (BENCHMARKS / step.script).exists()
        for name in benches.get(step.script, []):
            words = step.arguments[1:] if step.arguments[:1] == ("--cases",) else ()
            cases = [word for word in words if word in shapes.SHAPES[name]["cuda"]]
            measured |= {(name, case) for case in cases or shapes.SHAPES[name]["cuda"]}
    assert measured == {(name, case) for name in shapes.SHAPES for case in
                        shapes.SHAPES[name]["cuda"]}  # fmt: skip
