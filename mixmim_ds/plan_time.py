"""How long a step, a checkpoint and a run take: arithmetic on the model's FLOPs, a rate and bandwidths that are given.

A step is computing, then waiting for what could not be sent meanwhile. Bytes are those that a GPU sends under ring
algorithms, 2 (N - 1) / N of the size for an all-reduce, half of it for a reduce-scatter or an all-gather. Left out
are latencies, the update itself (it reads the share of masters and moments once), small micro-batches that fill a GPU
less, and the data path.
"""

from dataclasses import dataclass

from mixmim_ds.config import PretrainConfig
from mixmim_ds.device import DTYPES
from mixmim_ds.plan_memory import mechanics


@dataclass(frozen=True)
class Machine:
    """What the words of the planner say of the GPUs and of what joins them."""

    gpus_per_node: int
    nvlink_gbs: float  # GB/s that a GPU sends within a node
    link_gbs: float  # GB/s that a node sends to others, for each of its GPUs

    def link(self, gpus: int) -> float:
        """Bytes per second that a GPU sends in rings over so many of them. NCCL lays as many rings as a node has links
        to others; each ring leaves the node over one of them, so the links of a node add up, to at most NVLink's."""
        across = self.gpus_per_node * self.link_gbs
        return 1e9 * (self.nvlink_gbs if gpus <= self.gpus_per_node else min(across, self.nvlink_gbs))


def seconds_per_image(flops: int, mode: str, peak: float, mfu: float) -> float:
    """Computing of an image on a GPU.

    Args:
        flops: of a forward pass. Backward takes twice that; checkpointing=full repeats the forward pass, which MFU, as
            the run reports it, does not count.
        peak: FLOP/s of the GPU.
        mfu: its share that a run without recomputation reaches.
    """
    return flops * (4 if mode == "full" else 3) / (mfu * peak)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in a step."""

    gradients: float
    weights: float
    beside_backward: float  # of these, what could be sent while the backward passes compute, with overlap_comm
    overlap: bool  # whether the file says so

    @property
    def total(self) -> float:
        """Bytes that a GPU sends in a step."""
        return self.gradients + self.weights

    def times(self, link: float, computing: float) -> tuple[float, float, float]:
        """Seconds of sending, the share of it that overlap can hide, and the seconds that this run waits for it.

        Args:
            link: bytes per second.
            computing: seconds of a step's backward passes.
        """
        sending = self.total / link
        hidden = min(self.beside_backward / link, computing)
        return sending, hidden / sending if sending else 0.0, sending - (hidden if self.overlap else 0.0)


def traffic(total: int, config: PretrainConfig, gpus: int, accumulation: int) -> Traffic:
    """What the engine sends in a step, as DeepSpeed 0.19.8 does it.

    ZeRO-1 sums over micro-batches first and all-reduces once; in bf16 that is after the last backward pass, whatever
    overlap_comm says. ZeRO-2 all-reduces after each micro-batch, and keeps its share (a reduction to the owners, half
    of that, where use_multi_rank_bucket_allreduce is false). Both gather the weights after the update. ZeRO-3 gathers
    them in each micro-batch (once: they stay until the backward pass, see plan_memory.py; small ones stay for the whole
    step, which is left out) and reduce-scatters.

    Args:
        total: parameters.
    """
    rules, ring = mechanics(config), (gpus - 1) / gpus
    weights = ring * DTYPES[config.precision].itemsize * total
    once = ring * rules.communication_bytes * total
    overlap = bool(rules.zero.overlap_comm)
    if rules.stage == 1:
        late = config.precision == "bf16"
        return Traffic(2 * once, weights, 0.0 if late else 2 * once, overlap)
    if rules.stage == 2:
        gradients = accumulation * once * (2 if rules.zero.use_multi_rank_bucket_allreduce else 1)
        return Traffic(gradients, weights, gradients, overlap)
    return Traffic(accumulation * once, accumulation * weights, accumulation * once, overlap)


def checkpoint_bytes(total: int, buffers: int, config: PretrainConfig, gpus: int) -> int:
    """A checkpoint's files: masters and two moments in fp32, and the buffers (bytes), under ZeRO-3 those of every
    process."""
    return 12 * total + (gpus if mechanics(config).stage == 3 else 1) * buffers


@dataclass(frozen=True)
class Step:
    """Where the time of a step goes."""

    gpus: int
    global_batch: int
    micro_batch: int
    accumulation: int
    computing_s: float
    sending_s: float
    sent_gb: float  # by a GPU
    hideable: float  # share of the sending that overlap_comm could hide
    overlap: bool  # whether the file of ds_configs/ turns it on
    waiting_s: float  # of the sending, what is not hidden

    @property
    def seconds(self) -> float:
        """Computing plus waiting."""
        return self.computing_s + self.waiting_s

    @property
    def images_per_s(self) -> float:
        """Over all GPUs."""
        return self.global_batch / self.seconds


def step_of(config: PretrainConfig, total: int, gpus: int, accumulation: int, image_s: float, machine: Machine) -> Step:
    """A step of the run's micro-batch and mode.

    Args:
        total: parameters.
        accumulation: micro-batches of a step on each GPU.
        image_s: seconds of computing an image.
    """
    micro_batch, mode = config.train.micro_batch, config.activation_checkpointing
    computing = accumulation * micro_batch * image_s
    backward = computing * (3 / 4 if mode == "full" else 2 / 3)
    sent = traffic(total, config, gpus, accumulation)
    sending, hideable, waiting = sent.times(machine.link(gpus), backward)
    batch = accumulation * micro_batch * gpus
    return Step(
        gpus, batch, micro_batch, accumulation, computing, sending, sent.total / 1e9, hideable, sent.overlap, waiting
    )
