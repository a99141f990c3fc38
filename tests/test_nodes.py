"""A teacher that is sharded over the processes of one node."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import logged, run_config, start
from test_parity import check_parity

from mlkd_dist.config import UserError
from mlkd_dist.models.nodes import by_node

GROUPS = ("world", "node")


def test_processes_are_told_apart_by_node() -> None:
    assert by_node([0]) == [[0]]
    assert by_node([0, 1, 2]) == [[0, 1, 2]]
    # Nodes need not have as many processes each.
    assert by_node([0, 1, 0, 1, 2]) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(
    "local_ranks,message",
    [
        ([0, 0, 1, 1], "numbered node by node, and the launcher gave LOCAL_RANK"),
        ([1, 0], "numbered node by node"),
        ([0, 2], "numbered node by node"),
        ([0, 0], "shards nothing where a node has one process"),
        ([0, 1, 0], "shards nothing"),
    ],
)
def test_other_processes_are_refused(local_ranks: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        by_node(local_ranks)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> dict:
    """The same runs in four processes of two nodes, the teacher sharded over all, over each node,
    or not; with a second share of the student in each node; and two runs in which the last process
    has other weights."""
    base = tmp_path_factory.mktemp("nodes")
    cases = [(task, group, 3) for task in ("classification", "causal_lm") for group in GROUPS]
    cases += [("causal_lm", "second", 3)]
    cases += [("perturbed", "world", 0), ("perturbed", "node", 3)]
    found: dict = {}
    for task, group, zero_stage in cases:
        folder = base / f"{task}-{group}"
        folder.mkdir()
        teacher = teachers.get(task, teachers["classification"])
        config = run_config(folder, teacher, data, task if task in teachers else "classification")
        config["student"]["zero_stage"] = 3 if task == "causal_lm" else 2
        own = group if group in GROUPS else "world"
        config["teacher"] |= {"zero_stage": zero_stage, "shard_group": own}
        if group == "second":
            zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
            config["deepspeed"] = {"zero_optimization": zero}
        config["batch"] |= {"micro_batch": 1, "evaluation": 2}
        config["launch"], config["stages"][0]["steps"] = {"timeout": 77}, 3
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        found[task, group] = {"config": config, "path": path}
    (base / "logs").mkdir()
    paths = [str(each["path"]) for each in found.values()]
    start("node_runs.py", paths, base / "logs", 4, per_node=2, limit=1800)
    for each in found.values():
        files = [Path(f"{each['path']}.{rank}.json") for rank in range(4)]
        each["seen"] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_teacher_inside_the_node_teaches_the_same(two_nodes: dict, task: str) -> None:
    configs = [two_nodes[task, group]["config"] for group in GROUPS]
    world, node = map(logged, configs)
    assert len(world) == 3
    check_parity({("node",): node}, world)
    reports = [
        json.loads((Path(config["run"]["dir"]) / "report.json").read_text()) for config in configs
    ]
    assert reports[0]["teacher"]["quality"] == pytest.approx(reports[1]["teacher"]["quality"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_its_weights_stay_inside_the_node(two_nodes: dict, task: str) -> None:
    across = {}
    for group, share in (("world", 4), ("node", 2)):
        across[group] = set()
        for rank, process in enumerate(two_nodes[task, group]["seen"]):
            # Every tensor is filled up to equal parts.
            assert process["held"] == pytest.approx(process["whole"] / share, rel=0.02)
            assert process["limits"] and set(process["limits"]) == {77.0}
            # In the first two DeepSpeed compares the order of the layers.
            for call in process["calls"][2:]:
                across[group] |= {
                    k for k, _, ranks in call if {r // 2 for r in ranks} != {rank // 2}
                }
    assert across["world"] and not across["node"]
    # A forward pass gathers the whole teacher: half of it from the other one of the node.
    last = two_nodes[task, "node"]["seen"][3]
    for call in last["calls"][2:]:
        sizes = [size for _, size, ranks in call if ranks == [2, 3]]
        assert sum(sizes) == pytest.approx(4 * last["whole"] / 2, rel=0.05)


@pytest.mark.slow
def test_a_second_share_in_each_node_trains_the_same_student(two_nodes: dict) -> None:
    """ZeRO++'s hierarchical partitioning (hpZ): half of the student once more in each process."""
    there, usual = (two_nodes["causal_lm", group] for group in ("second", "world"))
    check_parity({("second",): logged(there["config"])}, logged(usual["config"]))
    for with_it, without in zip(there["seen"], usual["seen"], strict=True):
        assert without["second"] == 0
        assert with_it["second"] == pytest.approx(with_it["student"] / 2, rel=0.02)


@pytest.mark.slow
def test_a_process_with_other_weights_is_named(two_nodes: dict) -> None:
    for group, named, others in (("world", "3", "3"), ("node", "2, 3", "2")):
        for process in two_nodes["perturbed", group]["seen"]:
            assert f"the teacher of process {named} says other things" in process["refused"]
            assert f"that of the other {others};" in process["refused"]
        made = Path(two_nodes["perturbed", group]["config"]["run"]["dir"])
        assert not (made / "checkpoints").exists() and not (made / "metrics.jsonl").exists()
