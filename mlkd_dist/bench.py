"""`mlkd bench`: what distillation costs. The step of each stage beside its floor, and each loss.

The floor of a step is what remains where nothing is distilled: the teacher's forward pass, and the
student's forward, backward and optimizer step on hard labels alone, or on the sum of its last
hidden states where the task has no labels. Both are the run's own `train_step` in its own engines,
which keep their weights while the losses are exchanged.
"""

import copy
import ctypes
import gc
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlkd_dist import __version__, tasks
from mlkd_dist.config import Config, StageConfig, UserError
from mlkd_dist.data import cache_folder
from mlkd_dist.engine import Engine, student_engine
from mlkd_dist.finetune import finetune_config, finished, with_finetuned_teacher
from mlkd_dist.inputs.batches import Sampler, batches
from mlkd_dist.metrics import Clock, peak_gib
from mlkd_dist.models.model import load_model, read_config
from mlkd_dist.objective import Objective, Peers, Term, weighted_sum
from mlkd_dist.preflight import check_start, prepared
from mlkd_dist.processes.world import World, barrier, gather_objects
from mlkd_dist.rules.schema import loss_options, loss_schema
from mlkd_dist.run import Run, class_count, on_first, source, starting_student, user_errors
from mlkd_dist.saving.commit import writable
from mlkd_dist.schedule import learning_rate, total_steps
from mlkd_dist.stage import stage_objective, stage_teacher, train_step, trainable
from mlkd_dist.student import Student
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs, Trace
from mlkd_dist.watching.watch import Watch
from mlkd_kernels import choose

FLOOR, STEP, HARD_LABELS = "floor", "step", "hard_labels"
KEYS = ("floor_s", "step_s", "overhead", "floor_peak_gib", "step_peak_gib")


class Floor(Objective):
    """Some terms of a stage, or none, and the loss of its floor."""

    def __init__(self, stage: Objective, terms: list[Term], labelled: bool):
        vars(self).update(vars(stage))
        self.terms, self.labelled = list(terms), labelled
        if labelled and HARD_LABELS not in self.names:
            options = loss_options(HARD_LABELS, loss_schema(HARD_LABELS), None)
            like = stage.terms[0]
            self.terms.append(Term(HARD_LABELS, options, like.backend, [], like.vocabulary))

    def needs(self, side: int) -> Needs:
        needs = super().needs(side)
        if side == 1 or self.labelled:
            return needs
        return needs.union(Needs(layers={self.student.layers - 1: frozenset({"hidden"})}))

    def __call__(
        self,
        student: Trace,
        teacher: Trace | None,
        batch: Batch,
        rows: dict[str, Tensor],
        projections: nn.ModuleDict,
        peers: Peers | None,
        index: int,
    ) -> tuple[Tensor, Tensor]:
        given = (student, teacher, batch, rows, projections, peers, index)
        if self.labelled:
            return super().__call__(*given)
        states = student.layers[self.student.layers - 1].hidden
        loss = weighted_sum(states.float().sum(-1), batch.mask.float()) / rows["token"]
        if not self.terms:
            idle = self.idle_projections(projections)
            return torch.stack([loss, *idle]).sum(), loss.new_zeros(0)
        more, shares = super().__call__(*given)
        return loss + more, shares


class TeacherTime:
    """Takes the place of a run's metrics in the step, and writes nothing."""

    def __init__(self, device: torch.device):
        self.teacher_clock = Clock(device)
        self.open_terms: list[str] = []
        self.open_layers: dict[str, float] = {}

    def add(self, shares: Tensor) -> None:
        pass

    def step(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Bench:
    """The models of one stage, and the micro-batches that every measurement takes."""

    run: Run
    teacher: Teacher | None
    student: Student
    engine: Engine
    micro_batches: list[list[Batch]]
    variants: dict[str, Objective]  # floor, step, and floor with one term, by name of the term

    def use(self, variant: str) -> None:
        self.student.objective = self.variants[variant]
        if self.teacher is not None:
            # Where a run never makes the teacher's logits over a vocabulary, its floor does not.
            head = self.variants[STEP].needs(1).model & {"head"}
            self.teacher.needs = self.variants[variant].needs(1).union(Needs(model=head))

    def step(self, variant: str, index: int, metrics: TeacherTime) -> None:
        train_step(
            self.teacher,
            self.engine,
            self.variants[variant],
            self.micro_batches[index],
            metrics,
            index,
            seed=(self.run.config.run.seed, index),
            watch=Watch(self.run.config.run, self.run.world),
        )

    def seconds(self, variant: str) -> tuple[float, float]:
        """Of a step, until all processes are through, and of the teacher in it. A step before them
        is not counted: it fills caches, and ZeRO-3 learns there in which order weights are used."""
        self.use(variant)
        metrics = TeacherTime(self.run.world.device)
        self.step(variant, 0, metrics)
        wait(self.run.world)
        metrics.teacher_clock.seconds()
        start = time.perf_counter()
        for index in range(len(self.micro_batches)):
            self.step(variant, index, metrics)
        wait(self.run.world)
        seconds = time.perf_counter() - start, metrics.teacher_clock.seconds()
        return tuple(total / len(self.micro_batches) for total in seconds)

    def peak(self, variant: str) -> float:
        """GiB, of the process that needs most."""
        self.use(variant)
        metrics = TeacherTime(self.run.world.device)

        def work() -> None:
            for index in range(len(self.micro_batches)):
                self.step(variant, index, metrics)

        return max(gather_objects(peak_of(work, self.run.world.device)))

    def close(self) -> None:
        if self.teacher is not None:
            self.teacher.close()
        self.engine.destroy()


def wait(world: World) -> None:
    """Until this device and all processes are done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    barrier()


def peak_of(work: Callable[[], None], device: torch.device) -> float:
    """GiB at the peak of `work`: of the device's tensors on a GPU, of the process on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return peak_gib(device)
    # What freed tensors left to the process is given back first, then Linux forgets the peak so
    # far; where it cannot, the largest peak until now is what remains to be told.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        work()
        return peak_gib(device)
    forget.write_text("5")
    work()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def bench(config: Config, world: World) -> None:
    """Every stage, measured in a folder of its own beside the run's, which is not touched."""
    if config.teacher.cache is not None:
        raise UserError(
            "teacher.cache: `mlkd bench` times steps with their teacher; add teacher.cache=null."
        )
    out = Path(config.bench.out or f"{config.run.dir.rstrip('/')}-bench.json")
    if config.bench.out is not None and not writable(out):
        raise UserError(f"bench.out: {str(out)!r} cannot be written; name a file in a folder.")
    with own_folder(config, world) as folder:
        config = copy.deepcopy(config)
        config = with_some_teacher(config, world, folder)
        config.run.dir = str(folder / "run")
        check_start(config, world)
        run = prepared(config, world, source(config))
        list_in_cache(run)
        made = on_first(world, user_errors(lambda: starting_student(config, folder)))
        student_path = made or str(folder / "student")
        stages = [
            measure(run, stage, index, student_path) for index, stage in enumerate(config.stages)
        ]
    if world.first:
        found = describe(run) | whole(stages) | {"stages": stages}
        out.write_text(json.dumps(found, indent=2) + "\n")
        print(table(found), f"written to {out}", sep="\n\n", flush=True)


def list_in_cache(run: Run) -> None:
    """The rows that are left out; the folder of the measurement is removed."""
    if any(run.quarantine.counts.values()):
        folder = cache_folder(run.config.data.cache)
        path = on_first(run.world, user_errors(lambda: str(run.quarantine.list_in(folder))))
        run.quarantine.tell(path)


@contextmanager
def own_folder(config: Config, world: World) -> Iterator[Path]:
    """Beside the run's, so that all nodes of a cluster see it."""
    run = Path(config.run.dir)

    def make() -> str:
        run.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=run.parent, prefix=f".{run.name}-bench-")

    folder = Path(on_first(world, user_errors(make)))
    try:
        yield folder
    finally:
        if world.first:
            shutil.rmtree(folder, ignore_errors=True)


def with_some_teacher(config: Config, world: World, folder: Path) -> Config:
    """Where the teacher is to be fine-tuned first: the fine-tuned one if it is there, else one with
    a new head, which takes the same time."""
    if config.teacher.finetune is None:
        return config
    own = finetune_config(config)
    if on_first(world, lambda: finished(own)):
        return with_finetuned_teacher(config)
    own.run.dir = str(folder / "teacher")
    check_start(own, world)
    run = prepared(own, world, source(own))

    def make() -> None:
        found = read_config(own.student.path, own.trust_remote_code)
        found.num_labels = class_count(run) or found.num_labels
        model = load_model(
            tasks.load(own.task.kind).model_class,
            own.student.path,
            config=found,
            dtype="fp32",
            attention=own.student.attention,
            new_head=True,
            trust_remote_code=own.trust_remote_code,
        )
        model.save_pretrained(own.run.dir)
        run.tokenizer.save_pretrained(own.run.dir)

    on_first(world, user_errors(make))
    config.teacher.path, config.teacher.finetune = own.run.dir, None
    return config


def measure(run: Run, stage: StageConfig, index: int, student_path: str) -> dict[str, Any]:
    """Floor, step, and floor with each loss by itself, in turn and round after round, so that
    whatever else the machine does meets all of them."""
    bench = prepare(run, stage, index, student_path)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in bench.variants}
    for turn in range(run.config.bench.rounds + 1):
        names = list(bench.variants)
        for name in names if turn % 2 else reversed(names):
            seconds = bench.seconds(name)
            # The first round warms up.
            times[name] += [seconds] if turn else []
    peaks = {name: bench.peak(name) for name in (FLOOR, STEP)}
    labelled = bench.variants[FLOOR].labelled
    bench.close()
    medians = {name: statistics.median(s for s, _ in found) for name, found in times.items()}
    losses = {name: medians[name] - medians[FLOOR] for name in medians if name not in (FLOOR, STEP)}
    return {
        "name": stage.name,
        "steps": stage_steps(run, stage, index),
        "floor": "hard_labels" if labelled else "sum of the last hidden states",
        "floor_s": medians[FLOOR],
        "step_s": medians[STEP],
        "overhead": medians[STEP] / medians[FLOOR],
        "floor_peak_gib": peaks[FLOOR],
        "step_peak_gib": peaks[STEP],
        "teacher_s": statistics.median(teacher for _, teacher in times[STEP]),
        "losses": {
            name: {"seconds": seconds, "share": seconds / medians[STEP]}
            for name, seconds in losses.items()
        },
        "measured_s": {name: [seconds for seconds, _ in found] for name, found in times.items()},
    }


def prepare(run: Run, stage: StageConfig, index: int, student_path: str) -> Bench:
    """The stage's models as `distill` makes them. All its layers are open."""
    config, world = run.config, run.world
    micro_batches = some_batches(run, index)
    objective = stage_objective(run, stage, student_path)
    teacher = stage_teacher(run, objective)
    student = Student(trainable(run, student_path), objective)
    schedule = learning_rate(config.optim, stage_steps(run, stage, index))
    lr = config.optim.lr if stage.lr is None else stage.lr
    engine = student_engine(student.to(world.device), config, schedule, lr)
    engine.train()
    labelled = micro_batches[0][0].labels is not None
    variants = {FLOOR: Floor(objective, [], labelled), STEP: objective}
    variants |= {term.name: Floor(objective, [term], labelled) for term in objective.terms}
    return Bench(run, teacher, student, engine, micro_batches, variants)


def sampler(run: Run, index: int) -> Sampler:
    batch, world = run.config.batch, run.world
    layout = (batch.micro_batch, batch.grad_accum, world.rank, world.size)
    return Sampler(len(run.train), *layout, seed=run.config.run.seed + index)


def stage_steps(run: Run, stage: StageConfig, index: int) -> int:
    return total_steps(stage, sampler(run, index).steps_per_epoch)


def some_batches(run: Run, index: int) -> list[list[Batch]]:
    """The first steps of the stage, on the device before anything is timed."""

    def collate(rows: list[dict[str, Any]], keep: list[bool]) -> Batch:
        return run.task.collate(rows, keep, run.tokenizer)

    loader = batches(run.train, sampler(run, index), 0, run.config.bench.steps, collate)
    return [[batch.to(run.world.device) for batch in step] for step in loader]


def describe(run: Run) -> dict[str, Any]:
    cuda = run.world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "processes": run.world.size,
        "mlkd_dist": __version__,
        "torch": torch.__version__,
        "backend": choose(run.config.kernels),
        "batch": asdict(run.config.batch),
        "max_length": run.config.data.max_length,
        "rounds": run.config.bench.rounds,
    }


def whole(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole run: times of a mean step, each stage counted by its steps; the largest peak."""
    total = sum(stage["steps"] for stage in stages)

    def mean(seconds: Callable[[dict[str, Any]], float]) -> float:
        return sum(stage["steps"] * seconds(stage) for stage in stages) / total

    floor, step = mean(lambda stage: stage["floor_s"]), mean(lambda stage: stage["step_s"])
    names = dict.fromkeys(name for stage in stages for name in stage["losses"])
    losses, none = {}, {"seconds": 0.0}
    for name in names:
        seconds = mean(lambda stage, name=name: stage["losses"].get(name, none)["seconds"])
        losses[name] = {"seconds": seconds, "share": seconds / step}
    peaks = {key: max(stage[key] for stage in stages) for key in KEYS[3:]}
    return {"floor_s": floor, "step_s": step, "overhead": step / floor} | peaks | {"losses": losses}


def table(found: dict[str, Any]) -> str:
    """For the terminal; times in milliseconds."""
    lines = [f"{'':28}{'floor ms':>10}{'step ms':>10}{'overhead':>10}{'floor GiB':>11}{'GiB':>8}"]
    for stage in [*found["stages"], found]:
        name = stage.get("name", "whole run")
        lines.append(
            f"{name[:27]:28}{stage['floor_s'] * 1e3:10.1f}{stage['step_s'] * 1e3:10.1f}"
            f"{stage['overhead']:10.3f}{stage['floor_peak_gib']:11.2f}{stage['step_peak_gib']:8.2f}"
        )
        if stage is found:
            break
        for loss, cost in stage["losses"].items():
            share = f"{100 * cost['share']:.1f} %"
            lines.append(f"  {loss[:25]:26}{'':10}{cost['seconds'] * 1e3:10.1f}{share:>10}")
    lines += ["", "A loss: what it adds to the floor by itself, and its share of the step."]
    return "\n".join(lines)
