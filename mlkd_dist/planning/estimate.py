"""What a run takes of one process under a choice of what is sharded, by the formulas of
footprint.py."""

from dataclasses import dataclass
from itertools import product

from mlkd_dist.config import Config
from mlkd_dist.planning import footprint
from mlkd_dist.planning.cluster import Cluster
from mlkd_dist.planning.footprint import Wire
from mlkd_dist.planning.model_sizes import Models

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Choice:
    teacher_zero: int
    teacher_group: str
    student_zero: int
    teacher_offload: str
    checkpointing: bool


@dataclass(frozen=True)
class Plan:
    """Bytes of one process under a choice, for one micro-batch."""

    choice: Choice
    micro_batch: int
    teacher_weights: float
    student_weights: float
    gradients: float
    optimizer: float
    activations: float
    traces: float
    logits: float
    buffers: float
    late: float  # of gradients and buffers what is there at the end of a backward pass only
    host: float
    disk: float
    wire: Wire
    flops: float  # of a step

    @property
    def total(self) -> float:
        """Of the device, at the peak: at the begin of the backward pass, or at its end, when what
        is late has taken the place of what was kept for it."""
        names = ("teacher_weights", "student_weights", "gradients", "optimizer", "activations")
        parts = sum(getattr(self, name) for name in (*names, "traces", "logits", "buffers"))
        return parts - min(self.activations + self.logits, self.late)


def choices(config: Config, cluster: Cluster) -> list[Choice]:
    """Every ZeRO stage of both and every group of the teacher, with the run's own offload and
    checkpointing."""
    checkpointing = config.student.activation_checkpointing != "none"
    nodes = cluster.nodes > 1 and cluster.gpus_per_node > 1
    teachers = [(0, "world"), (3, "world"), *([(3, "node")] if nodes else [])]
    offload = {0: "none", 3: config.teacher.offload}
    return [
        Choice(zero, group, student, offload[zero], checkpointing)
        for (zero, group), student in product(teachers, (0, 1, 2, 3))
    ]


def estimate(
    config: Config, models: Models, cluster: Cluster, choice: Choice, micro_batch: int
) -> Plan:
    """The peak is in the teacher's forward pass or in the student's backward; what either has at
    once is added to what both hold."""
    world, accum, length = cluster.world, config.batch.grad_accum, config.data.max_length
    w, student = WIDTHS[config.student.dtype], models.student
    student_offload = config.student.offload == "cpu" and choice.student_zero > 0
    ours = footprint.trained(
        student.parameters, choice.student_zero, w, world, accum, student_offload
    )
    copied = footprint.CHECKPOINT_BYTES * student.parameters / world
    tokens = micro_batch * length
    held = w * tokens * models.student_trace[0] if choice.checkpointing else 0
    work = 4 * tokens * models.compared
    eager = config.student.attention == "eager"
    backward = held + footprint.activations(
        student, micro_batch, length, w, choice.checkpointing, eager, config.student.dropout
    )
    logits = footprint.logits(student, micro_batch, length, w, models.reads_head)
    live = footprint.gathered_student(student, choice.student_zero, w)
    zero = config.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", footprint.BUCKET))
    ready = footprint.buffers(student.parameters, choice.student_zero, w, world, bucket)
    live += ready
    late = footprint.late(ours.gradients, ready, choice.student_zero, accum)
    t, node = WIDTHS[config.teacher.dtype], choice.teacher_group == "node"
    per_sample = length * models.teacher_trace[0] + models.teacher_trace[1]
    theirs, first, teacher_wire = footprint.States(0, 0, 0, 0), 0.0, 0.0
    if models.teacher is not None:
        teacher, shards = models.teacher, cluster.gpus_per_node if node else world
        theirs = footprint.frozen(
            teacher.parameters, choice.teacher_zero, t, shards, choice.teacher_offload
        )
        # What enters a head over a vocabulary, in the place of its logits.
        per_sample += length * teacher.hidden if teacher.outputs and models.reads_head else 0
        eager = config.teacher.attention == "eager"
        first = footprint.forward_only(teacher, micro_batch, length, t, eager)
        first += footprint.gathered_teacher(teacher, choice.teacher_zero, t)
        teacher_wire = footprint.teacher_wire(
            teacher.parameters, choice.teacher_zero, t, shards, accum
        )
    # Where losses compare samples of a whole step, its traces are all there at once.
    kept = accum if models.gathered else 1
    traces = kept * micro_batch * t * per_sample
    traces += 4 * models.gathered * micro_batch * accum * world
    extra = bool(models.gathered) and accum > 1
    wire = Wire(
        0 if node else teacher_wire,
        footprint.student_wire(student.parameters, choice.student_zero, w, world, accum, extra),
        footprint.sample_wire(models.gathered, micro_batch, world, accum),
        teacher_wire if node else 0,
    )
    return Plan(
        choice,
        micro_batch,
        theirs.weights,
        ours.weights,
        ours.gradients,
        ours.optimizer,
        backward,
        traces + work,
        logits,
        # Beyond what the student's pass and the losses need anyway.
        live + max(0.0, first - backward - work - logits - live),
        late,
        theirs.host + ours.host + (copied if config.run.save_in_background else 0),
        theirs.disk,
        wire,
        footprint.step_flops(models.teacher, student, accum * tokens, length, choice.checkpointing),
    )
