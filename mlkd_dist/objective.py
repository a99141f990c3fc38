"""The losses of a stage, put together: terms -> rows -> one weighted sum, divided once by the rows
of all processes.

A loss returns one number per row. Here rows that do not count are left out, the rest are summed,
and the sum is divided by the number of rows that count in the whole step: all micro-batches of all
processes. So the update does not depend on how the samples of a step are spread over processes and
micro-batches.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mlkd_dist.layer_map import Pairs, layer_pairs
from mlkd_dist.losses import load
from mlkd_dist.models.head import HeadRows
from mlkd_dist.processes.world import World, all_gather, all_reduce
from mlkd_dist.rules.schema import LossSchema, loss_schema
from mlkd_dist.schedule import Opening
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import LAYER_READS, Needs, Samples, Trace
from mlkd_dist.watching.reach import Reach
from mlkd_dist.watching.watch import Watch

ROW_KINDS = ("token", "sample", "label", "labelled")
# Options that this file acts on; the rest go to the loss.
COMMON = ("weight", "layers", "sum_layers", "average", "project", "shared_projection")


@dataclass(frozen=True)
class Widths:
    """What of a model its losses and projections depend on."""

    hidden: int
    layers: int


@dataclass
class Term:
    """One loss of a stage."""

    name: str
    options: dict[str, Any]
    backend: str
    pairs: Pairs
    vocabulary: bool = False  # whether there is a row of logits per token
    schema: LossSchema = field(init=False)
    function: Callable[..., Tensor] = field(init=False)
    weighs: bool = field(init=False)  # whether it sums its rows by itself

    def __post_init__(self) -> None:
        self.schema = loss_schema(self.name)
        function = load(self.name, "over_vocabulary" if self.at_head else None)
        own = {key: value for key, value in self.options.items() if key not in COMMON}
        known = inspect.signature(function).parameters
        if "backend" in known:
            own["backend"] = self.backend
        self.function = functools.partial(function, **own)
        self.weighs = "row_weight" in known

    @property
    def at_head(self) -> bool:
        """Whether it reads what enters the output heads, instead of logits."""
        return self.vocabulary and self.schema.rows == "label"

    @property
    def divisor(self) -> str:
        """Which of ROW_KINDS the sum is divided by."""
        if self.options.get("average") == "sample":
            return "sample"
        # Without a teacher, only what is labelled says anything.
        teacher, rows = self.schema.teacher, self.schema.rows
        return "labelled" if rows == "label" and not teacher else rows

    def needs(self, side: int, pairs: Pairs) -> Needs:
        """Of the student (side 0) or the teacher (side 1), of these of its layer pairs."""
        if side == 1 and not self.schema.teacher:
            return Needs()
        reads = frozenset(["head"] if self.at_head else self.schema.read_by(self.options))
        if self.schema.scope == "module":
            return Needs(matrices={pair[side]: self.matrix_reads(side, reads) for pair in pairs})
        if self.schema.scope != "layer":
            return Needs(model=reads)
        assert reads <= set(LAYER_READS), reads
        return Needs(layers={pair[side]: reads for pair in pairs})

    def matrix_reads(self, side: int, roles: frozenset[str]) -> frozenset[tuple[str, str]]:
        """With the teacher's input, the student's matrices are applied once more."""
        if self.options["input"] == "own":
            fields = ["output"]
        else:
            fields = ["apply"] if side == 0 else ["input", "output"]
        return frozenset(product(roles, fields))

    def sum_of(self, read: tuple[Any, ...], weight: Tensor) -> Tensor:
        """Of its rows, each with its weight."""
        if self.weighs:
            return self.function(*read, row_weight=weight)
        return weighted_sum(self.function(*read), weight)

    def projection_key(self, student_layer: int | None = None) -> str:
        shared = student_layer is None or self.options["shared_projection"]
        return self.name if shared else f"{self.name}_{student_layer}"


@dataclass
class Peers:
    """The sample vectors of a whole step, [world, micro-batches, B, D] for each term over the
    batch. Those of the student are None where each process has one micro-batch: its forward gathers
    them then."""

    student: dict[str, Tensor | None]
    teacher: dict[str, Tensor]
    keep: Tensor  # [world, micro-batches, B] bool
    labels: Tensor | None  # [world, micro-batches, B]


class Objective:
    """The losses of one stage for one pair of models."""

    def __init__(
        self,
        losses: dict[str, dict[str, Any]],
        layers: Any,
        student: Widths,
        teacher: Widths | None,
        backend: str,
        world: World,
        vocabulary: bool = False,
    ):
        self.world, self.student, self.teacher = world, student, teacher
        # Which terms count at the present step; None: all of them.
        self.opening: Opening | None = None
        self.reach = Reach(name for name, options in losses.items() if options["weight"] == 0)
        self.terms = [
            Term(name, options, backend, self.pairs_of(name, options, layers), vocabulary)
            for name, options in losses.items()
        ]

    def pairs_of(self, name: str, options: dict[str, Any], layers: Any) -> Pairs:
        if not loss_schema(name).in_pairs:
            return []
        return layer_pairs(options["layers"] or layers, self.student.layers, self.teacher.layers)

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    @property
    def layers(self) -> list[int]:
        """Student layers that a term reads, from the bottom up."""
        return sorted({pair[0] for term in self.terms for pair in term.pairs})

    def open_pairs(self, term: Term) -> Pairs:
        if self.opening is None:
            return term.pairs
        return [pair for pair in term.pairs if pair[0] in self.opening.open]

    def is_open(self, term: Term) -> bool:
        if self.opening is None:
            return True
        if term.schema.in_pairs:
            return bool(self.open_pairs(term))
        return self.opening.predicts

    @property
    def open_names(self) -> list[str]:
        return [term.name for term in self.terms if self.is_open(term)]

    def open_layers(self) -> dict[str, float]:
        """For the logs: 1 for what counts at this step, else 0; nothing where all always does."""
        if self.opening is None:
            return {}
        now = {f"open/layer_{k}": float(k in self.opening.open) for k in self.opening.layers}
        return now | {"open/prediction": float(self.opening.predicts)}

    def end_step(self, step: int, shares: Tensor) -> bool:  # [terms] of this process's whole step
        """Lets the next layer open when it is time; True where that changed what counts."""
        if self.opening is None:
            return False
        watched = self.opening.watches and "cls_cosine" in self.open_names
        cosine = self.mean_cosine(shares) if watched else None
        return self.opening.end_step(step, cosine)

    def mean_cosine(self, shares: Tensor) -> Tensor:
        """The cosine loss per open layer pair, of all processes. Stays on the device."""
        index = self.names.index("cls_cosine")
        term, total = self.terms[index], all_reduce(shares[index].clone())
        pairs = len(self.open_pairs(term)) if term.options["sum_layers"] == "sum" else 1
        return total / max(pairs, 1)

    @property
    def batch_terms(self) -> list[Term]:
        """Open terms that compare the samples of the whole step with one another."""
        return [t for t in self.terms if t.schema.scope == "batch" and self.is_open(t)]

    def needs(self, side: int) -> Needs:
        """Of the student (side 0) or the teacher (side 1), for the open terms."""
        needs = Needs()
        for term in filter(self.is_open, self.terms):
            needs = needs.union(term.needs(side, self.open_pairs(term)))
        return needs

    @property
    def reads_teacher(self) -> bool:
        return any(term.schema.teacher for term in self.terms)

    def projections(self) -> nn.ModuleDict:
        """Learned maps from the student's width to the teacher's. They start as the identity on the
        leading coordinates, so that no random number is drawn and a student cut out of its teacher
        starts where it was."""
        maps = nn.ModuleDict()
        for term in self.terms:
            if not term.schema.projection:
                continue
            if term.options["project"] == "auto" and self.student.hidden == self.teacher.hidden:
                continue
            for layer in [pair[0] for pair in term.pairs] or [None]:
                linear = nn.Linear(self.student.hidden, self.teacher.hidden, bias=False)
                nn.init.eye_(linear.weight)
                maps[term.projection_key(layer)] = linear
                self.reach.projected.add(term.name)
        return maps

    def global_rows(self, batches: list[Batch], watch: Watch | None = None) -> dict[str, Tensor]:
        """How many rows count in this step, over all micro-batches and processes. One small
        all-reduce, which also carries what the processes have to agree on."""
        counts = torch.stack(
            [
                torch.stack([b.mask.sum(), b.samples, b.label_keep.sum(), b.labelled])
                for b in batches
            ]
        )
        counts = counts.to(torch.int64).sum(0)
        if watch is None:
            counts = all_reduce(counts)
        else:
            counts, flags = all_reduce(torch.cat([counts, watch.flags()])).tensor_split(
                [len(counts)]
            )
            watch.sum_flags(flags)
        return dict(zip(ROW_KINDS, counts.clamp_min(1).float().unbind(), strict=True))

    def peers(
        self, batches: list[Batch], seen: list[Trace], student: list[dict[str, Tensor]] | None
    ) -> Peers | None:
        """Gathers the sample vectors of the step from all processes; None where no term asks for
        them."""
        if not self.batch_terms:
            return None

        def gathered(per_batch: list[Tensor]) -> Tensor:
            return all_gather(torch.stack([tensor.detach() for tensor in per_batch]))

        teacher = {
            term.name: gathered([self.vector(term, trace) for trace in seen])
            for term in self.batch_terms
        }
        ours = {
            term.name: gathered([vectors[term.name] for vectors in student]) if student else None
            for term in self.batch_terms
        }
        given = batches[0].labels
        classes = given is not None and given.ndim == 1 and not given.is_floating_point()
        labels = gathered([batch.labels for batch in batches]) if classes else None
        keep = gathered([batch.keep.to(torch.uint8) for batch in batches]).bool()
        return Peers(ours, teacher, keep, labels)

    @staticmethod
    def vector(term: Term, trace: Trace) -> Tensor:  # [B, D]
        return trace.vectors[term.options["of"]].float()

    def student_vectors(self, trace: Trace, projections: nn.ModuleDict) -> dict[str, Tensor]:
        """What the terms over the batch read of the student, in the width that they compare."""

        def read(term: Term) -> Tensor:
            return self.reach.shown(term.name, None, self.vector(term, trace))

        return {
            term.name: self.projected(term, projections)(read(term)).float()
            for term in self.batch_terms
        }

    @staticmethod
    def projected(
        term: Term, projections: nn.ModuleDict, layer: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        key = term.projection_key(layer) if term.schema.projection else None
        if key not in projections:
            return lambda tensor: tensor
        return lambda tensor: projections[key](tensor.to(projections[key].weight.dtype))

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
        """The loss of micro-batch number `index` for the backward pass, and this micro-batch's
        share of each term ([terms], without weights) for the logs: the shares of a step sum to the
        terms of the global batch."""
        losses, shares = [], []
        self.reach.rows = {term.name: rows[term.divisor] for term in self.terms}
        at_head = self.head_sums(student, teacher, batch)
        for term in self.terms:
            if not self.is_open(term):
                sums = share = torch.zeros((), device=batch.keep.device)
            elif term.schema.scope == "batch":
                sums, share = self.batch_sums(term, student, projections, peers, index)
            elif term.at_head:
                sums = share = at_head[term.name]
            else:
                sums = share = self.sums(term, student, teacher, batch, projections)
            if self.is_open(term):
                self.reach.check(term.name, None, sums)
            losses.append(term.options["weight"] * sums / rows[term.divisor])
            shares.append(share.detach() / rows[term.divisor])
        idle = self.idle_projections(projections)
        total = torch.stack([*losses, *idle]).sum()
        self.reach.total(total)
        return total, torch.stack(shares)

    def idle_projections(self, projections: nn.ModuleDict) -> list[Tensor]:
        """A zero, with a gradient of zero, from each projection that no open term uses: where a
        parameter gets none at all, DeepSpeed's ZeRO-3 takes that of an earlier step again. The
        model's own weights always get one, once they had one: the layers that open read all that
        was open before. openings.py refuses where it would be otherwise."""
        used = set()
        for term in filter(self.is_open, self.terms):
            layers = [pair[0] for pair in self.open_pairs(term)] or [None]
            used |= {term.projection_key(layer) for layer in layers if term.schema.projection}
        return [
            linear(linear.weight.new_zeros(1, linear.in_features)).float().sum()
            for key, linear in projections.items()
            if key not in used
        ]

    def sums(
        self,
        term: Term,
        student: Trace,
        teacher: Trace | None,
        batch: Batch,
        projections: nn.ModuleDict,
    ) -> Tensor:
        """The sum over the rows of this micro-batch of a term over traces or layers."""
        weight = self.row_weight(term, batch)
        if term.schema.scope == "trace":
            ours = self.reach.shown(term.name, None, student)
            read = (ours, teacher) if term.schema.teacher else (ours,)
            extra = (self.projected(term, projections),) if term.schema.projection else ()
            return term.sum_of((*read, *extra), weight)
        total, pairs = torch.zeros((), device=weight.device), self.open_pairs(term)
        for ours, theirs in pairs:
            read = (
                self.reach.shown(term.name, ours, student.layers[ours]),
                teacher.layers[theirs],
            )
            extra = (self.projected(term, projections, ours),) if term.schema.projection else ()
            part = term.sum_of((*read, *extra), weight)
            self.reach.check(term.name, ours, part)
            total = total + part
        return total / len(pairs) if term.options["sum_layers"] == "mean" else total

    def head_sums(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """The sums of all terms over a vocabulary, in one use of each head's weights; no work is
        done for rows that do not count."""
        terms = [term for term in self.terms if term.at_head and self.is_open(term)]
        if not terms:
            return {}
        labels = batch.labels.flatten().index_select(0, batch.label_rows)
        weight = torch.ones_like(labels, dtype=torch.float32)

        def entering(trace: Trace) -> Tensor:  # [n, D]
            return trace.head_input.flatten(0, 1).index_select(0, batch.label_rows)

        def sums(ours: HeadRows) -> Tensor:
            with ExitStack() as stack:
                theirs = None if teacher is None else teacher.top_k
                if theirs is None and any(term.schema.teacher for term in terms):
                    theirs = stack.enter_context(teacher.head.opened(entering(teacher)))
                read = [self.reach.shown(term.name, None, ours) for term in terms]
                return torch.stack(
                    [
                        t.function(r, theirs, weight, labels)
                        for t, r in zip(terms, read, strict=True)
                    ]
                )

        found = student.head.within(entering(student), sums)
        return dict(zip([term.name for term in terms], found.unbind(), strict=True))

    @staticmethod
    def row_weight(term: Term, batch: Batch) -> Tensor:  # [B] or [B, L]
        if term.schema.rows == "label":
            return batch.label_keep.float()
        if term.schema.rows == "sample":
            return batch.keep.float()
        return batch.sample_mean if term.divisor == "sample" else batch.mask.float()

    def batch_sums(
        self, term: Term, student: Trace, projections: nn.ModuleDict, peers: Peers, index: int
    ) -> tuple[Tensor, Tensor]:
        """A term over the global batch: the sum over all its rows, and over those of this
        micro-batch.

        Every process computes the whole batch, with gradient through its own micro-batch only. The
        gradients of all micro-batches of all processes then add up to that of the whole, without a
        collective in the backward pass.
        """
        own = self.student_vectors(student, projections)[term.name]
        rank = self.world.rank
        everyone = peers.student[term.name]
        everyone = all_gather(own.detach()).unsqueeze(1) if everyone is None else everyone.clone()
        everyone[rank, index] = own
        keep = peers.keep.flatten()
        labels = None if peers.labels is None else peers.labels.flatten()
        values = term.function(
            Samples(everyone.flatten(0, 2), keep, labels),
            Samples(peers.teacher[term.name].flatten(0, 2), keep, labels),
        )
        values = torch.where(keep, values, 0.0)
        return values.sum(), values.view(peers.keep.shape)[rank, index].sum()


def weighted_sum(rows: Tensor, weight: Tensor) -> Tensor:
    """[B], [B, L] or [B, R, L] rows, of which the heads R are averaged; rows without weight cannot
    matter."""
    if rows.ndim > weight.ndim:
        rows = rows.mean(1)
    return (torch.where(weight > 0, rows, 0.0) * weight).sum()
