"""`mlkd plan`: memory per process and traffic per step of a run, before it waits in a queue.

From config files alone: no weights are read, nothing is started. The sizes of models are from
model_sizes.py, what they come to from estimate.py.
"""

import copy
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlkd_dist import config as configs
from mlkd_dist.config import Config, UserError
from mlkd_dist.planning.cluster import Cluster, cluster_of, room
from mlkd_dist.planning.estimate import Choice, Plan, choices, estimate
from mlkd_dist.planning.footprint import GIB
from mlkd_dist.planning.model_sizes import Models, models_of

LARGEST_BATCH = 2**20
PARTS = ("teacher_weights", "student_weights", "gradients", "optimizer", "activations", "traces")
PARTS += ("logits", "buffers", "total", "host", "disk")


def main(path: str, words: list[str]) -> str:
    """Writes what is asked for and returns the table. Raises UserError."""
    cluster, settings = cluster_of(words)
    config = configs.load(path, settings)
    if config.kernels == "eager":
        raise UserError("kernels: eager builds matrices of L x L for tests; plan with auto.")
    models = models_of(config)
    plans = [
        estimate(config, models, cluster, choice, config.batch.micro_batch)
        for choice in choices(config, cluster)
    ]
    best = recommended(config, models, cluster)
    found = {
        "cluster": asdict(cluster),
        "teacher_parameters": models.teacher.parameters if models.teacher else 0,
        "student_parameters": models.student.parameters,
        "choices": [
            told(plan, largest_micro_batch(config, models, cluster, plan.choice), cluster)
            for plan in plans
        ],
        "recommended": None if best is None else told(best, best.micro_batch, cluster),
    }
    if cluster.json is not None:
        Path(cluster.json).write_text(json.dumps(found, indent=2) + "\n")
    if cluster.out is not None:
        if best is None:
            raise UserError("out: nothing fits, so there is no config to recommend; see the plan.")
        configs.save(with_choice(config, best, cluster), Path(cluster.out))
    return table(found, config, cluster)


def largest_micro_batch(config: Config, models: Models, cluster: Cluster, choice: Choice) -> int:
    """0 where not even one sample fits."""

    def fits(samples: int) -> bool:
        return estimate(config, models, cluster, choice, samples).total <= room(cluster)

    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def recommended(
    config: Config, models: Models, cluster: Cluster, offloads: tuple[str, ...] = ("none", "cpu")
) -> Plan | None:
    """Of the choices under which the run's micro-batch fits, that with the least traffic, then the
    least memory. Where there is none, first checkpointing, then the teacher's offload, then both
    are tried; at last smaller micro-batches, more of them. None where not even one sample fits."""
    tried: list[Choice] = []
    for offload, checkpointing in product(offloads, (False, True)):
        more = [
            replace(
                choice,
                teacher_offload=offload if may_move(choice) else choice.teacher_offload,
                checkpointing=choice.checkpointing or checkpointing,
            )
            for choice in choices(config, cluster)
        ]
        if (best := least(config, models, cluster, more)) is not None:
            return best
        tried += more
    # As few equal parts of the micro-batch as there must be; the global batch stays what it is.
    given = config.batch.micro_batch
    for parts in (n for n in range(2, given + 1) if given % n == 0):
        if (best := least(with_parts(config, parts), models, cluster, tried)) is not None:
            return best
    return None


def may_move(choice: Choice) -> bool:
    return choice.teacher_zero == 3 and choice.teacher_offload == "none"


def least(config: Config, models: Models, cluster: Cluster, among: list[Choice]) -> Plan | None:
    """Of the choices under which the micro-batch fits, that with the least traffic, then the least
    memory."""
    micro_batch = config.batch.micro_batch
    plans = [estimate(config, models, cluster, choice, micro_batch) for choice in among]
    fitting = [plan for plan in plans if plan.total <= room(cluster)]
    return min(fitting, key=lambda p: (p.wire.total, p.wire.inside, p.total), default=None)


def with_parts(config: Config, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.batch.micro_batch //= parts
    config.batch.grad_accum *= parts
    return config


def with_choice(config: Config, plan: Plan, cluster: Cluster) -> Config:
    config = with_parts(config, config.batch.micro_batch // plan.micro_batch)
    choice = plan.choice
    config.teacher.zero_stage, config.student.zero_stage = choice.teacher_zero, choice.student_zero
    config.teacher.shard_group = choice.teacher_group
    config.teacher.offload = choice.teacher_offload
    if choice.teacher_offload != "nvme":
        config.teacher.offload_dir = None
    if choice.student_zero == 0:
        config.student.offload = "none"
    checkpointing = "non_reentrant" if choice.checkpointing else "none"
    config.student.activation_checkpointing = checkpointing
    config.launch.processes = cluster.gpus_per_node
    configs.check(config)
    return config


def told(plan: Plan, largest: int, cluster: Cluster) -> dict[str, Any]:
    """In GiB."""
    found: dict[str, Any] = asdict(plan.choice) | {"micro_batch": plan.micro_batch}
    found |= {f"{name}_gib": getattr(plan, name) / GIB for name in PARTS}
    found["fits"] = plan.total <= room(cluster)
    found["largest_micro_batch"] = largest
    found["wire_gib"] = asdict(plan.wire) | {"total": plan.wire.total}
    found["wire_gib"] = {key: size / GIB for key, size in found["wire_gib"].items()}
    if cluster.bandwidth:
        found["wire_s"] = plan.wire.total / (cluster.bandwidth * 1e9)
        if cluster.node_bandwidth:
            found["wire_s"] += plan.wire.inside / (cluster.node_bandwidth * 1e9)
    found["tflop"] = plan.flops / 1e12
    if cluster.tflops:
        found["compute_s"] = found["tflop"] / cluster.tflops
    return found


def table(found: dict[str, Any], config: Config, cluster: Cluster) -> str:
    used = any(plan["disk_gib"] for plan in found["choices"])
    parts = [name for name in PARTS if used or name != "disk"]
    heads = ["ZeRO t/s", *(name.replace("_weights", " w") for name in parts)]
    heads += ["wire", "in node", "largest"]
    heads = [head.replace("gradients", "grads").replace("activations", "activ.") for head in heads]
    rows = []
    for plan in found["choices"]:
        sizes_of_plan = [plan[f"{name}_gib"] for name in parts]
        sizes_of_plan += [plan["wire_gib"]["total"], plan["wire_gib"]["inside"]]
        group = " node" if plan["teacher_group"] == "node" else ""
        fits = "" if plan["fits"] else " !"
        name = f"{plan['teacher_zero']}{group} / {plan['student_zero']}{fits}"
        rows.append([name, *(f"{size:.2f}" for size in sizes_of_plan)])
        rows[-1].append(str(plan["largest_micro_batch"]))
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, "
        f"{cluster.reserve:g} of them in reserve. Teacher {found['teacher_parameters']:,} "
        f"parameters (as deep as it is read), student {found['student_parameters']:,}.",
        f"GiB per process at micro-batch {config.batch.micro_batch} x {config.data.max_length} "
        f"tokens; wire: sent per process and step; in node: sent inside the node by a teacher that "
        f"is sharded there; ! does not fit. Total: at the peak, when not all of the rest is there.",
        "",
        *(f"{row[0]:>13}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in [heads, *rows]),
        "",
    ]
    best = found["recommended"]
    if best is None:
        return "\n".join([*lines, "Nothing fits: use more GPUs, or shorter texts."])
    words = [f"teacher.zero_stage={best['teacher_zero']}"]
    words += ["teacher.shard_group=node"] if best["teacher_group"] == "node" else []
    words += [f"student.zero_stage={best['student_zero']}"]
    offload = best["teacher_offload"]
    words += [f"teacher.offload={offload}"] if offload != "none" else []
    words += ["student.activation_checkpointing=non_reentrant"] if best["checkpointing"] else []
    parts = config.batch.micro_batch // best["micro_batch"]
    words += [f"batch.micro_batch={best['micro_batch']}"]
    words += [f"batch.grad_accum={config.batch.grad_accum * parts}"]
    seconds = f", {best['wire_s']:.2f} s on the wire" if "wire_s" in best else ""
    if "compute_s" in best:
        seconds += f", {best['compute_s']:.2f} s of arithmetic"
    lines.append(f"Recommended ({best['total_gib']:.1f} GiB{seconds}): {' '.join(words)}")
    return "\n".join(lines)
