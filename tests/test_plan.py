"""`mlkd plan`: its formulas against what DeepSpeed holds and what models show, its choices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_config
from torch.utils.flop_counter import FlopCounterMode

from mlkd_dist import config as configs
from mlkd_dist import plan, tasks
from mlkd_dist.config import UserError
from mlkd_dist.models.model import load_model, read_config
from mlkd_dist.models.tap import capture
from mlkd_dist.planning import footprint, model_sizes
from mlkd_dist.planning.cluster import Cluster, cluster_of, room
from mlkd_dist.planning.estimate import Choice, Plan, choices, estimate
from mlkd_dist.planning.footprint import GIB
from mlkd_dist.student import cut_config, make_student
from mlkd_kernels.streamed import linear_divergence

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SIZES = {
    "70b": dict(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672
    ),
    "8b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336
    ),
}


WORLDS = [8, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 64, 1000, 4096))]


@pytest.mark.parametrize("world", WORLDS)
def test_states_and_traffic_are_those_of_deepspeed(world: int) -> None:
    """Within 1 %."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    words = [sys.executable, str(ROOT / "tests" / "held_bytes.py"), str(world)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1500)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 15, done.stderr[-3000:]
    for case in found:
        width, parameters = {"fp32": 4, "bf16": 2}[case["dtype"]], case["parameters"]
        if "shards" in case:
            states = footprint.frozen(parameters, 3, width, case["shards"], "none")
            rests = states.weights
            wire = footprint.teacher_wire(parameters, 3, width, case["shards"], 1)
            assert case["ranks"] == case["shards"]
        else:
            stage, accum = case["zero_stage"], case["accum"]
            states = footprint.trained(parameters, stage, width, world, accum, False)
            rests = states.weights + states.optimizer
            buffers = footprint.buffers(parameters, stage, width, world, case["bucket"])
            # At ZeRO 3 gradients have their place for good, and so has the bucket.
            rests += states.gradients + buffers if stage == 3 else 0
            wire = footprint.student_wire(parameters, stage, width, world, accum, False)
            # That of the last matrix is there in any case until the step.
            gradients = max(states.gradients, width * 512 * 512)
            held = rests + (0 if stage == 3 else gradients)
            # Where they add up whole, the bucket is there beside them.
            held += buffers if stage == 1 and accum > 1 else 0
            assert case["with_gradients"] == pytest.approx(held, rel=0.01), case
        assert case["rests"] == pytest.approx(rests, rel=0.01), case
        assert case["sent"] == pytest.approx(wire, rel=0.01), case


def test_offload_moves_what_is_not_weights() -> None:
    there, here = (footprint.trained(1000, 2, 2, 10, 1, offload) for offload in (True, False))
    assert (there.weights, there.optimizer, there.host) == (here.weights, 0, 1600)
    assert there.gradients == 0 and here.gradients == 200
    # A teacher rests in one place.
    at = {place: footprint.frozen(1000, 3, 2, 10, place) for place in ("none", "cpu", "nvme")}
    assert {place: (s.weights, s.host, s.disk) for place, s in at.items()} == {
        "none": (200, 0, 0),
        "cpu": (0, 200, 0),
        "nvme": (0, 0, 200),
    }
    # At ZeRO 1 the gradients of several micro-batches add up whole.
    assert footprint.trained(1000, 1, 2, 10, 4, False).gradients == 2000


def test_bytes_on_the_wire() -> None:
    """By hand, for 10 processes, 1000 bf16 parameters and 4 micro-batches."""
    wire = [footprint.student_wire(1000, stage, 2, 10, 4, False) for stage in range(4)]
    # 2000 bytes: twice; twice and once more; twice in every micro-batch and once; 2 in every one.
    assert wire == [0.9 * 4000, 0.9 * 6000, 0.9 * 18000, 0.9 * 16000]
    assert footprint.student_wire(1000, 3, 2, 10, 4, True) == 0.9 * 24000
    assert footprint.teacher_wire(1000, 0, 2, 10, 4) == 0
    assert footprint.teacher_wire(1000, 3, 2, 10, 4) == 0.9 * 8000
    assert footprint.sample_wire(8, 16, 10, 4) == 4 * 8 * 16 * 4 * 9
    assert footprint.student_wire(1000, 2, 2, 1, 4, False) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    config = run_config(folder, teachers["classification"], data)
    config["stages"].insert(0, {"name": "modules", "steps": 2, "losses": {"hidden_mse": {}}})
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return {"path": str(folder / "small.yaml"), "folder": folder, "given": config}


def test_parameters_are_those_of_the_models(small: dict, teachers: dict) -> None:
    config = configs.load(small["path"])
    models = model_sizes.models_of(config)
    model_class = tasks.load("classification").model_class
    teacher = model_class.from_pretrained(teachers["classification"])
    assert models.teacher.parameters == sum(p.numel() for p in teacher.parameters())
    out = small["folder"] / "student"
    make_student(model_class, str(teachers["classification"]), config.student, out)
    student = model_class.from_pretrained(out)
    # From 24 to 48: of hidden_mse, embedding_mse, cls_cosine, sample_contrast.
    maps = 4 * 24 * 48
    assert models.student.parameters == sum(p.numel() for p in student.parameters()) + maps


def test_a_teacher_is_as_deep_as_it_is_read(small: dict, teachers: dict) -> None:
    """And has no head where no loss reads logits."""
    changed = small["given"] | {"stages": [{"name": "one", "steps": 1, "losses": {}}]}
    changed["stages"][0]["losses"] = {"hidden_mse": {"layers": [[0, 1]]}}
    models = model_sizes.models_of(configs.from_mapping(changed))
    whole = model_sizes.models_of(configs.load(small["path"]))
    assert (models.teacher.layers, whole.teacher.layers) == (2, 4)
    # Two layers less, and the classifier: 48 x 3 and 3.
    layer = 4 * (48 * 48 + 48) + 2 * 48 * 64 + 64 + 48 + 4 * 48
    assert whole.teacher.parameters - models.teacher.parameters == 2 * layer + 48 * 3 + 3


def test_a_trace_has_the_numbers_that_are_counted(small: dict, teachers: dict) -> None:
    config = configs.load(small["path"])
    models = model_sizes.models_of(config)
    path = str(teachers["classification"])
    found = read_config(path)
    made = model_sizes.objective(config, 1, found, found)
    # Of the run's own student, whose layers pair with other ones of the teacher.
    widths = configs.FromTeacherConfig(layers=2, heads=2, hidden=24)
    made = model_sizes.objective(config, 1, cut_config(found, widths), found)
    model_class = tasks.load("classification").model_class
    model = load_model(model_class, path, config=found, dtype="fp32", attention="sdpa").eval()
    inputs = {"input_ids": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    trace = capture(model, model, inputs, made.needs(1), None)
    kept = [value for layer in trace.layers.values() for value in vars(layer).values()]
    kept += [trace.embedding, *trace.vectors.values()]
    numbers = sum(
        value.numel()
        for value in kept
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    )
    per_token, per_sample = models.teacher_trace
    assert numbers == 3 * 7 * per_token + 3 * per_sample


def test_a_teacher_that_is_read_from_files_has_traces_alone(small: dict) -> None:
    losses = {"hidden_mse": {}, "sample_relation": {}, "soft_labels": {}}
    changed = small["given"] | {"stages": [{"name": "one", "steps": 1, "losses": losses}]}
    cluster, choice = Cluster(nodes=2, gpus_per_node=4), Choice(3, "world", 2, "none", False)
    found = []
    for cache in None, {"dir": str(small["folder"] / "cache")}:
        config = configs.from_mapping(changed | {"teacher": changed["teacher"] | {"cache": cache}})
        found.append(estimate(config, model_sizes.models_of(config), cluster, choice, 4))
    live, cached = found
    assert live.teacher_weights > cached.teacher_weights == cached.wire.teacher == 0
    assert live.traces == cached.traces > 0
    assert live.wire.samples == cached.wire.samples > 0
    assert live.flops > cached.flops


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_what_autograd_keeps(attention: str, teachers: dict) -> None:
    """Within a quarter: kernels keep a little more or less than the formula's list."""
    path = str(teachers["embedding"])
    found = read_config(path)
    found.hidden_dropout_prob = found.attention_probs_dropout_prob = 0.0
    model_class = tasks.load("embedding").model_class
    model = load_model(model_class, path, config=found, dtype="fp32", attention=attention)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = {"input_ids": torch.ones(4, 48, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones(4, 48, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs).last_hidden_state.sum()
    config = configs.Config()
    size = model_sizes.size_of(config, found, model)
    counted = footprint.activations(size, 4, 48, 4, False, attention == "eager", False)
    assert sum(kept.values()) == pytest.approx(counted, rel=0.25)


def test_arithmetic_is_what_torch_counts(teachers: dict) -> None:
    """Of a Llama with its head: forward, and forward with backward."""
    path = str(teachers["causal_lm"])
    found, model_class = read_config(path), tasks.load("causal_lm").model_class
    model = load_model(model_class, path, config=found, dtype="fp32", attention="eager")
    config = configs.Config()
    config.task.kind = "causal_lm"
    size = model_sizes.size_of(config, found, model)
    ids = torch.ones(3, 16, dtype=torch.long)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids).logits.sum()
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    assert footprint.forward_flops(size, 48, 16) == pytest.approx(counts[0], rel=0.01)
    assert footprint.step_flops(None, size, 48, 16, False) == pytest.approx(counts[1], rel=0.01)
    step = footprint.step_flops(size, size, 48, 16, True)
    assert step == pytest.approx(counts[0] + counts[1] + counts[0], rel=0.01)


def test_a_head_is_taken_in_the_chunks_of_its_kernel() -> None:
    assert (footprint.HEAD_BYTES, footprint.MIN_TOKENS) == (
        linear_divergence.CUDA_BYTES,
        linear_divergence.MIN_CUDA_TOKENS,
    )
    size = footprint.Size(0, 0, 1, 100, 0, 0, 0, 0, False, outputs=128_000)
    few = footprint.logits(size, 1, 8, 2, True)
    assert few == 8 * 128_000 * 10 + 4 * (8 + 128_000) * 100
    # Twice the tokens are one more gradient of the head's input, and no logits.
    two, four = (footprint.logits(size, n, 2**16, 2, True) for n in (2, 4))
    assert four - two == 4 * 2 * 2**16 * 100
    assert footprint.logits(size, 1, 8, 2, False) == 8 * 128_000 * 2


@pytest.fixture
def large(tmp_path: Path) -> str:
    """Folders with nothing but config.json."""
    for name, size in SIZES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | size))
    config = {
        "teacher": {"path": str(tmp_path / "70b"), "zero_stage": 3},
        "student": {"path": str(tmp_path / "8b"), "dtype": "bf16", "zero_stage": 3},
        "data": {"train": "builtin:python_docs", "max_length": 4096},
        "stages": [{"steps": 10, "losses": {"hidden_mse": {"layers": "last"}}}],
        "batch": {"micro_batch": 4},
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "large.yaml")


def by_choice(found: dict) -> dict[tuple, dict]:
    return {(c["teacher_zero"], c["teacher_group"], c["student_zero"]): c for c in found["choices"]}


def test_a_large_pair_is_planned_without_its_weights(large: str, tmp_path: Path) -> None:
    words = ["nodes=32", "gpus_per_node=8", "gpu_memory=80", "bandwidth=50", "tflops=400"]
    out, told = tmp_path / "recommended.yaml", tmp_path / "plan.json"
    shown = plan.main(large, [*words, f"out={out}", f"json={told}"])
    found = json.loads(told.read_text())
    # The published counts, 70,553,706,496 and 8,030,261,248, without heads; a map from 4096 to
    # 8192.
    assert found["teacher_parameters"] == 70_553_706_496 - 128256 * 8192
    assert found["student_parameters"] == 8_030_261_248 - 128256 * 4096 + 4096 * 8192
    by = by_choice(found)
    assert len(by) == 12 and not any(by[0, "world", stage]["fits"] for stage in range(4))
    both = by[3, "world", 3]
    assert both["teacher_weights_gib"] * GIB == pytest.approx(found["teacher_parameters"] * 2 / 256)
    wire = 2 * found["teacher_parameters"] + 6 * found["student_parameters"]
    assert both["wire_gib"]["total"] * GIB == pytest.approx(wire * 255 / 256)
    assert both["wire_s"] == pytest.approx(wire * 255 / 256 / 50e9)
    assert both["compute_s"] == both["tflop"] / 400
    assert both["total_gib"] == pytest.approx(
        sum(both[f"{name}_gib"] for name in plan.PARTS[: plan.PARTS.index("total")]), rel=1e-6
    )
    # What is recommended fits, is a config, and is the same global batch.
    best = found["recommended"]
    assert best["fits"] and "Recommended" in shown
    config = configs.load(out)
    assert config.batch.micro_batch * config.batch.grad_accum == 4
    assert config.teacher.zero_stage == best["teacher_zero"] == 3
    again = json.loads(json.dumps(best))
    plan.main(str(out), [*words, f"json={told}"])
    (key,) = by_choice({"choices": [best]})
    assert by_choice(json.loads(told.read_text()))[key]["total_gib"] == pytest.approx(
        again["total_gib"]
    )


def test_a_teacher_on_a_disk_takes_no_memory(large: str, tmp_path: Path) -> None:
    told, out = tmp_path / "plan.json", tmp_path / "recommended.yaml"
    words = ["nodes=1", "gpus_per_node=8", f"json={told}", f"out={out}"]
    offload = ["teacher.offload=nvme", "teacher.offload_dir=/local"]
    shown = plan.main(large, [*words, *offload, "teacher.shard_group=node"])
    found = json.loads(told.read_text())
    there = by_choice(found)[3, "world", 3]
    assert (there["teacher_weights_gib"], there["host_gib"]) == (0, 0)
    assert there["disk_gib"] * GIB == pytest.approx(2 * found["teacher_parameters"] / 8)
    assert "teacher.offload=nvme" in shown and "disk" in shown
    config = configs.load(out)
    assert (config.teacher.offload, config.teacher.offload_dir) == ("nvme", "/local")
    assert "disk" not in plan.main(large, words)


def test_what_is_saved_in_the_background_is_copied_to_the_host(large: str, tmp_path: Path) -> None:
    told = tmp_path / "plan.json"
    plan.main(large, [f"json={told}", "run.save_in_background=true"])
    found = json.loads(told.read_text())
    for choice in found["choices"]:
        assert choice["host_gib"] * GIB == pytest.approx(12 * found["student_parameters"] / 8)


def test_a_teacher_inside_the_node_sends_nothing_between_nodes(large: str, tmp_path: Path) -> None:
    """And is what is recommended where an eighth of it fits."""
    told, out = tmp_path / "plan.json", tmp_path / "recommended.yaml"
    words = ["nodes=32", "bandwidth=50", "node_bandwidth=400", f"json={told}", f"out={out}"]
    shown = plan.main(large, words)
    found = json.loads(told.read_text())
    inside, over_all = (by_choice(found)[3, group, 3] for group in ("node", "world"))
    teacher, student = (found[f"{who}_parameters"] for who in ("teacher", "student"))
    assert inside["teacher_weights_gib"] * GIB == pytest.approx(2 * teacher / 8)
    assert inside["total_gib"] - over_all["total_gib"] == pytest.approx(
        2 * teacher * (1 / 8 - 1 / 256) / GIB
    )
    wire = inside["wire_gib"]
    assert wire["teacher"] == 0 and over_all["wire_gib"]["inside"] == 0
    assert wire["total"] * GIB == pytest.approx(6 * student * 255 / 256)
    assert wire["inside"] * GIB == pytest.approx(2 * teacher * 7 / 8)
    assert inside["wire_s"] == pytest.approx(
        6 * student * 255 / 256 / 50e9 + 2 * teacher * 7 / 8 / 400e9
    )
    best = found["recommended"]
    assert best["teacher_group"] == "node" and "teacher.shard_group=node" in shown
    assert configs.load(out).teacher.shard_group == "node"


def test_a_teacher_inside_the_node_is_a_choice_where_nodes_have_several(large: str) -> None:
    config = configs.load(large)
    for words, offered in (
        (["nodes=2"], {"world", "node"}),
        (["nodes=1"], {"world"}),
        (["nodes=2", "gpus_per_node=1"], {"world"}),
    ):
        cluster, _ = cluster_of(words)
        assert {choice.teacher_group for choice in choices(config, cluster)} == offered


def test_the_largest_micro_batch_is_the_last_that_fits(large: str) -> None:
    cluster, _ = cluster_of(["nodes=32"])
    config = configs.load(large)
    models = model_sizes.models_of(config)
    choice = Choice(3, "world", 3, "none", True)
    most = plan.largest_micro_batch(config, models, cluster, choice)
    assert most > 0
    fits = [
        estimate(config, models, cluster, choice, samples).total <= room(cluster)
        for samples in (most, most + 1)
    ]
    assert fits == [True, False]
    # More processes make room.
    more, _ = cluster_of(["nodes=64"])
    assert plan.largest_micro_batch(config, models, more, choice) >= most


def test_a_language_model_is_planned_with_its_head(large: str) -> None:
    given = yaml.safe_load(Path(large).read_text())
    given["task"] = {"kind": "causal_lm"}
    given["stages"] = [{"steps": 10, "losses": {"soft_labels": {}}}]
    config = configs.from_mapping(given)
    models = model_sizes.models_of(config)
    assert models.teacher.parameters == 70_553_706_496
    assert models.student.parameters == 8_030_261_248
    assert models.student.outputs == 128256 and models.reads_head
    cluster, _ = cluster_of(["nodes=32"])
    found = estimate(config, models, cluster, Choice(3, "world", 3, "none", True), 4)
    # What enters the teacher's head.
    assert found.traces == 4 * 4096 * 8192 * 2
    assert found.logits == footprint.logits(models.student, 4, 4096, 2, True)


def test_what_does_not_fit_is_said(large: str, tmp_path: Path) -> None:
    shown = plan.main(large, ["nodes=1", "gpus_per_node=1", "gpu_memory=16"])
    assert "Nothing fits" in shown
    with pytest.raises(UserError, match="nothing fits"):
        plan.main(large, ["gpus_per_node=1", "gpu_memory=16", f"out={tmp_path}/x.yaml"])
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize(
    "word,message",
    [
        ("nodes=many", "nodes is a number"),
        ("nodes=0", "nodes: 0 is not allowed"),
        ("tflops=0", "tflops: 0.0 is not allowed"),
        ("node_bandwidth=0", "node_bandwidth: 0.0 is not allowed"),
        ("gpu_memory=-1", "gpu_memory: -1.0 is not allowed"),
        ("gpu_memry=80", "did you mean 'gpu_memory'"),
        ("out=nowhere/at/all.yaml", "cannot be written; name a file"),
        ("json=", "json: '' cannot be written"),
        ("reserve=nan", "reserve: nan is not allowed"),
    ],
)
def test_wrong_words_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster_of([word])


def test_settings_of_the_run_are_left_to_it() -> None:
    cluster, rest = cluster_of(["nodes=2", "batch.micro_batch=3", "gpu_memory=40"])
    assert (cluster.world, cluster.gpu_memory, rest) == (16, 40.0, ["batch.micro_batch=3"])


def test_what_is_late_takes_the_place_of_activations() -> None:
    """By hand. 400 bytes of gradients, 300 of buffers; then a plan with few activations, and one
    with many."""
    late = {
        (stage, accum): footprint.late(400, 300, stage, accum)
        for stage in range(4)
        for accum in (1, 2)
    }
    assert late[0, 1] == 700 and late[0, 2] == 300
    assert late[1, 1] == late[2, 1] == 400
    assert late[1, 2] == late[2, 2] == late[3, 1] == late[3, 2] == 0
    nothing = dict.fromkeys((*plan.PARTS, "flops", "micro_batch", "choice", "wire"), 0)
    del nothing["total"]
    held = nothing | {"student_weights": 1000, "gradients": 400, "buffers": 300, "late": 700}
    few = Plan(**held | {"activations": 200, "logits": 100})
    many = Plan(**held | {"activations": 2000})
    # 1000 and 400 and 300, the activations being gone; 1000 and 2000, the gradients yet to come.
    assert (few.total, many.total) == (1700, 3000)
