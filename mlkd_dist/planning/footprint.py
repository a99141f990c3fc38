"""Bytes per process and on the wire, and arithmetic, by formula. Numbers only: no torch, no models.

N processes, P parameters (a model's, shared ones once), w bytes per number of its type, B samples
of L tokens per micro-batch, A micro-batches per step. What DeepSpeed holds was measured with 0.19.8
under torch's fake process group of 8 and 1000 ranks (tests/test_plan.py repeats that).
"""

from dataclasses import dataclass

GIB = 2**30
# DeepSpeed 0.19.8's defaults, in numbers.
BUCKET = 500_000_000
PREFETCH = 50_000_000
MAX_LIVE = 1_000_000_000
# Of a parameter: fp32 weight and two moments.
CHECKPOINT_BYTES = 12
# Those of mlkd_kernels/streamed/linear_divergence.py on a GPU.
HEAD_BYTES = 3 * 2**30
MIN_TOKENS = 1024


@dataclass(frozen=True)
class Size:
    """What of a model its bytes depend on."""

    parameters: int
    largest: int  # parameters of the largest module that is gathered as one
    layers: int
    hidden: int
    attention: int  # heads times width of a head
    key: int  # key heads times width of a head
    heads: int
    inner: int  # width of the feed-forward block
    gated: bool
    outputs: int  # logits per token; 0 where the head says one vector per sample
    multiplied: int = 0  # parameters that every token is multiplied with: all but looked up ones


@dataclass(frozen=True)
class States:
    """Bytes of one process between two steps."""

    weights: float
    gradients: float
    optimizer: float
    host: float  # of what is offloaded
    disk: float = 0


def trained(
    parameters: int, zero_stage: int, width: int, world: int, grad_accum: int, offload: bool
) -> States:
    """A model under AdamW.

    weights w P, whole below ZeRO 3, else w P / N.
    optimizer: two moments and a master copy in fp32, 12 P / N; whole at ZeRO 0, where fp32 needs no
    master copy: 8 P. From ZeRO 1 on DeepSpeed keeps one for fp32 too.
    gradients w P at ZeRO 0, else w P / N; at ZeRO 1 they add up whole over the micro-batches of a
    step, w P where A > 1.
    With offload, master copy, moments and fp32 gradients, 16 P / N, rest on the host.

    Rajbhandari et al. 2020 (arXiv 1910.02054), with DeepSpeed's own copies as measured.
    """
    share = 1 if zero_stage == 0 else 1 / world
    optimizer = (8 if zero_stage == 0 and width == 4 else 12) * parameters * share
    whole_gradients = zero_stage == 0 or (zero_stage == 1 and grad_accum > 1)
    gradients = width * parameters * (1 if whole_gradients else share)
    weights = width * parameters * (share if zero_stage == 3 else 1)
    if offload:
        return States(weights, gradients - width * parameters * share, 0, 16 * parameters * share)
    return States(weights, gradients, optimizer, 0)


def frozen(parameters: int, zero_stage: int, width: int, shards: int, offload: str) -> States:
    """A teacher: w P, at ZeRO 3 w P over the processes it is sharded over, all or those of a node;
    with offload on the host, or on a disk. No other copy is held."""
    weights = width * parameters / (shards if zero_stage == 3 else 1)
    places = {
        "none": States(weights, 0, 0, 0),
        "cpu": States(0, 0, 0, weights),
        "nvme": States(0, 0, 0, 0, weights),
    }
    return places[offload]


def gathered_teacher(size: Size, zero_stage: int, width: int) -> float:
    """At ZeRO 3, weights that are whole at once in a forward pass: the module that runs and what is
    fetched before its turn, w min(P, largest + prefetch bucket), and the bucket that they are
    copied out of, w min(P, prefetch bucket). A trace uses each of them once, so that nothing
    stays."""
    ahead = min(size.parameters, PREFETCH)
    whole = min(size.parameters, size.largest + PREFETCH)
    return width * (whole + ahead) if zero_stage == 3 else 0


def gathered_student(size: Size, zero_stage: int, width: int) -> float:
    """At ZeRO 3: what the backward pass needs again soon stays gathered, up to
    stage3_max_live_parameters: w min(P, 1e9)."""
    return width * min(size.parameters, MAX_LIVE) if zero_stage == 3 else 0


def buffers(parameters: int, zero_stage: int, width: int, world: int, bucket: int) -> float:
    """Gradients on their way. ZeRO 1 to 3 take a whole reduce bucket, w times its size, however
    small the model is; ZeRO 0 copies at most what there is."""
    if zero_stage == 0:
        return 0 if world == 1 else width * min(parameters, BUCKET)
    return width * bucket


def late(gradients: float, buffers: float, zero_stage: int, grad_accum: int) -> float:
    """What of both is there at the end of a step's backward pass only. Gradients are dropped after
    each step, but at ZeRO 3, where they have their place for good, and are kept where they add up
    over micro-batches. At ZeRO 0 they are copied to be sent once all are there; from ZeRO 1 on the
    bucket is filled from the begin of the backward pass."""
    kept = zero_stage == 3 or grad_accum > 1
    return (0 if kept else gradients) + (buffers if zero_stage == 0 else 0)


def activations(
    size: Size,
    samples: int,
    length: int,
    width: int,
    checkpointing: bool,
    matrices: bool,
    dropout: bool,
) -> float:
    """What a forward pass of the student keeps for the backward pass.

    Numbers per token and layer, with D hidden, A = heads times head width, K the same of key heads,
    F the feed-forward width: inputs of two norms and of the matrices behind them 4 D; query and
    context (input of the output matrix) 2 A; key and value 2 K; around the activation function 2 F,
    or with a gate 4 F (up, gate, its activation, their product). With dropout two masks of D bytes.
    `matrices` (attention: eager) adds the maps: scores and softmax, 2 H L numbers per token, and
    H L bytes of mask. For A = K = D, F = 4 D and w = 2 these are the 34 D + 5 H L bytes of
    Korthikanti et al. 2022 (arXiv 2205.05198); flash and sdpa attention keep no maps.

    With checkpointing a layer keeps its input, w D, and one layer at a time is whole.
    """
    tokens = samples * length
    numbers = 4 * size.hidden + 2 * size.attention + 2 * size.key
    numbers += (4 if size.gated else 2) * size.inner
    layer = width * numbers + (2 * size.hidden if dropout else 0)
    if matrices:
        layer += size.heads * length * (2 * width + (1 if dropout else 0))
    if checkpointing:
        return tokens * (size.layers * width * size.hidden + layer)
    return tokens * size.layers * layer


def forward_only(size: Size, samples: int, length: int, width: int, matrices: bool) -> float:
    """What the teacher's forward pass has at once: at most one layer's numbers."""
    one_layer = Size(**{**vars(size), "layers": 1})
    return activations(one_layer, samples, length, width, False, matrices, False)


def logits(size: Size, samples: int, length: int, width: int, compared: bool) -> float:
    """Of the student's head over a vocabulary V. Losses take it in chunks of n tokens, three
    buffers of n V numbers (two of fp32, one of w bytes), n the power of two that fits in HEAD_BYTES
    and at least MIN_TOKENS; the gradients of its input and weight are made on the way, in fp32:
    4 (B L + V) D. Where no loss reads logits the model makes them all the same, w B L V."""
    tokens, outputs = samples * length, size.outputs
    if outputs == 0 or not compared:
        return width * tokens * outputs
    most = max(HEAD_BYTES // ((8 + width) * outputs), 1)
    chunk = min(max(1 << (most.bit_length() - 1), MIN_TOKENS), tokens)
    return chunk * outputs * (8 + width) + 4 * (tokens + outputs) * size.hidden


def forward_flops(size: Size, tokens: int, length: int) -> float:
    """2 for each multiplied parameter and token, and 4 L A in each layer for the maps of attention
    (A = heads times head width), causal or not. Losses are not counted."""
    return tokens * (2 * size.multiplied + 4 * length * size.attention * size.layers)


def step_flops(
    teacher: Size | None, student: Size, tokens: int, length: int, checkpointing: bool
) -> float:
    """Of one process in a step of so many tokens: a forward pass of the teacher, and of the student
    forward and backward (twice forward), with checkpointing forward once more."""
    theirs = forward_flops(teacher, tokens, length) if teacher is not None else 0
    return theirs + (4 if checkpointing else 3) * forward_flops(student, tokens, length)


@dataclass(frozen=True)
class Wire:
    """Bytes that one process sends in an optimizer step, by rings over N: a gather or a
    reduce-scatter of S bytes sends S (N - 1) / N, an all-reduce twice that."""

    teacher: float
    student: float
    samples: float
    inside: float  # a teacher's, by rings over the processes of one node

    @property
    def total(self) -> float:
        """By rings over all processes."""
        return self.teacher + self.student + self.samples


def teacher_wire(
    parameters: int, zero_stage: int, width: int, shards: int, grad_accum: int
) -> float:
    """At ZeRO 3 one gather of all weights per micro-batch, among those that share them."""
    return ring(grad_accum * width * parameters, shards) if zero_stage == 3 else 0


def student_wire(
    parameters: int, zero_stage: int, width: int, world: int, grad_accum: int, extra_forward: bool
) -> float:
    """ZeRO 0: an all-reduce of the gradients per step. ZeRO 1: the same and a gather of the new
    weights. ZeRO 2: the all-reduce per micro-batch. ZeRO 3: per micro-batch a reduce-scatter of the
    gradients and a gather of the weights, two where they are more than stay gathered; one more for
    a forward pass that only looks ahead, where losses compare samples across micro-batches."""
    bytes_of_all = width * parameters
    if zero_stage == 0:
        return ring(2 * bytes_of_all, world)
    if zero_stage < 3:
        reduced = 2 * bytes_of_all * (grad_accum if zero_stage == 2 else 1)
        return ring(reduced + bytes_of_all, world)
    gathers = (1 if parameters <= MAX_LIVE else 2) + extra_forward
    return ring(grad_accum * (gathers + 1) * bytes_of_all, world)


def ring(size: float, world: int) -> float:
    return size * (world - 1) / world


def sample_wire(numbers: int, samples: int, world: int, grad_accum: int) -> float:
    """fp32 vectors of all samples, `numbers` per sample, to every process."""
    return 4 * numbers * samples * grad_accum * (world - 1)
