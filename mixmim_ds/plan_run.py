"""Will it fit, how long will it take: memory, time and communication before a node is asked for.

Nothing here is measured unless it was given as measured: memory and traffic are computed from the model and from what
DeepSpeed does (plan_memory.py, plan_time.py), rates and bandwidths are assumed or given, and the table says which.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.models import MixMIM
from mixmim_ds.plan_memory import (
    MODES,
    Activations,
    States,
    activations,
    attention_of_cuda,
    model_on_meta,
    states,
)
from mixmim_ds.plan_time import Machine, Step, checkpoint_bytes, seconds_per_image, step_of
from mixmim_ds.train.engine import accumulation, check_compile
from mixmim_ds.train.metrics import PEAK_FLOPS

# Share of the memory that stays free for what the count leaves out: CUDA's context, NCCL's and cuBLAS's buffers, DALI's
# decoders and its batches ahead (a few GB together), and the allocator's rounding and fragments. A run of weeks must
# not end for want of the last gigabyte.
HEADROOM = 0.10
MFU_WITH = "compile=true activation_checkpointing=selective"  # under which the default of `mfu` was measured
STAGES = ("zero1", "zero2", "zero3")
SCALING_NODES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Gpu:
    """Of the data sheets: memory in GB (1e9 bytes; CUDA offers a little more), NVLink in GB/s in one direction."""

    peak: str  # its name in PEAK_FLOPS
    memory_gb: float
    nvlink_gbs: float


GPUS = {
    "h100": Gpu("H100 80GB HBM3", 80, 450), "h200": Gpu("H200", 141, 450),
    "a100_40": Gpu("A100", 40, 300), "a100_80": Gpu("A100", 80, 300),
}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """The planner's own words; all others are the run's options."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    images: int = 1_281_167  # of the data set; ImageNet-1K
    img_s: float | None = None  # images/s of one GPU, measured without waiting for others
    mfu: float = 0.2  # assumed where img_s is not given; base reached it on an H100 with MFU_WITH (BENCHMARKS.md)
    link_gbs: float = 50.0  # GB/s that a node sends to others, for each of its GPUs; 400 Gbit/s is usual beside H100s
    disk_gbs: float = 2.0  # GB/s that all GPUs together write

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str | None) and not value > 0:
                raise ValueError(f"{name}={value} must be positive.")
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu} must be one of {', '.join(sorted(GPUS))}.")
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu} must be a share of the GPU's peak, at most 1.")

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def machine(self) -> Machine:
        """What the arithmetic of time needs of it."""
        return Machine(self.gpus_per_node, GPUS[self.gpu].nvlink_gbs, self.link_gbs)

    @property
    def budget(self) -> float:
        """Bytes of a GPU that a run may count on."""
        return (1 - HEADROOM) * GPUS[self.gpu].memory_gb * 1e9


def parse(words: list[str]) -> tuple[Words, PretrainConfig]:
    """The planner's words and the run that the others describe; data and run folder need not be given.

    Raises:
        ValueError: one sentence that names the word.
    """
    own: dict[str, Any] = {}
    others: list[str] = []
    types = {each.name: str if each.name == "gpu" else int if each.type is int else float for each in fields(Words)}
    for word in words:
        name, _, value = word.partition("=")
        if name in types:
            try:
                own[name] = types[name](value)
            except ValueError:
                kind = "a whole number" if types[name] is int else "a number"
                raise ValueError(f"{name}={value} must be {kind}.") from None
            continue
        near = difflib.get_close_matches(name, types, 1, 0.8)
        if near and "." not in name:
            raise ValueError(f"{name} is no option; did you mean {near[0]}?")
        others.append(word)
    given = {word.partition("=")[0] for word in others}
    needed = {"run_dir": "run_dir=PLANNED", "data.root": "data.root=PLANNED"}
    if "data=synthetic" in others:
        del needed["data.root"]
    return Words(**own), load_config([*(word for name, word in needed.items() if name not in given), *others])


@dataclass(frozen=True)
class Row:
    """A ZeRO stage and mode of checkpointing at one micro-batch."""

    ds: str
    mode: str
    micro_batch: int
    states: States
    activations: int
    total: int
    largest: int  # micro-batch that fits and divides; 0 = none


@dataclass(frozen=True)
class Plan:
    """All that is planned. Bytes, seconds, images."""

    words: Words
    config: PretrainConfig  # with the recommended setting
    parameters: int
    flops_per_image: int  # of a forward pass
    rows: list[Row]
    chosen: Row
    note: str  # on the setting that the options ask for
    image_s: float | None  # seconds of computing an image on a GPU; None if no rate is known
    step: Step | None
    steps: int
    saves: int
    checkpoint: int
    strong: list[Step] = field(default_factory=list)
    weak: list[Step] = field(default_factory=list)

    @property
    def checkpoint_s(self) -> float:
        """Seconds to write one checkpoint."""
        return self.checkpoint / (1e9 * self.words.disk_gbs)

    @property
    def run_s(self) -> float | None:
        """From the first step to the last, saving included."""
        return None if self.step is None else self.steps * self.step.seconds + self.saves * self.checkpoint_s


def with_setting(config: PretrainConfig, ds: str, mode: str, micro_batch: int) -> PretrainConfig:
    """The run under another setting of what may differ between two starts."""
    train = replace(config.train, micro_batch=micro_batch)
    return replace(config, ds=ds, activation_checkpointing=mode, train=train)


def micro_batches(global_batch: int, gpus: int) -> list[int]:
    """The even micro-batches that divide a GPU's share of the global batch, largest first. ValueError if none do."""
    share, rest = divmod(global_batch, gpus)
    if rest or share % 2 or not share:
        raise ValueError(
            f"train.global_batch={global_batch} does not divide into even micro-batches on {gpus} GPUs; make it a "
            f"multiple of {2 * gpus} or change nodes and gpus_per_node."
        )
    return [size for size in range(share, 1, -1) if size % 2 == 0 and share % size == 0]


class Memory:
    """What fits, for a run's model on its GPUs."""

    def __init__(self, words: Words, config: PretrainConfig, model: MixMIM) -> None:
        self.words, self.config = words, config
        self.stages = [ds for ds in STAGES if not (config.compile and ds == "zero3")]  # which the engine refuses
        self.sizes = [parameter.numel() for parameter in model.parameters()]
        with attention_of_cuda():
            self.lines: dict[str, Activations] = {mode: activations(model, mode) for mode in MODES}

    def row(self, ds: str, mode: str, micro_batch: int, candidates: list[int]) -> Row:
        """The ledger of a setting."""
        held = states(self.sizes, with_setting(self.config, ds, mode, micro_batch), self.words.gpus)
        line = self.lines[mode]
        fitting = (size for size in candidates if held.total(line.of(size)) <= self.words.budget)
        used = line.of(micro_batch)
        return Row(ds, mode, micro_batch, held, used, held.total(used), next(fitting, 0))

    def choose(self, wanted: int, candidates: list[int]) -> Row:
        """The least splitting, then the least recomputing, under which the wanted micro-batch fits, with the largest
        that does then; a smaller one is wanted only where nothing else helps. ValueError if nothing fits."""
        for size in (each for each in candidates if each <= wanted):
            for ds in self.stages:
                for mode in MODES:
                    row = self.row(ds, mode, size, candidates)
                    if row.total <= self.words.budget:
                        return self.row(ds, mode, row.largest, candidates)
        remedy = "; compile=false allows ds=zero3." if self.config.compile else "."
        raise ValueError(
            f"nothing fits into gpu={self.words.gpu} with {HEADROOM:.0%} to spare, not even {candidates[-1]} images "
            f"under ds={self.stages[-1]} and activation_checkpointing=full; take more nodes, another gpu, or a smaller "
            f"model{remedy}"
        )


def plan(words: Words, config: PretrainConfig) -> Plan:
    """The whole plan.

    Raises:
        ValueError: the batch does not divide, nothing fits, or an option is wrong.
    """
    candidates = micro_batches(config.train.global_batch, words.gpus)
    model = model_on_meta(config.model, config.precision)
    memory = Memory(words, config, model)
    wanted = next((size for size in candidates if size <= config.train.micro_batch), candidates[-1])
    chosen = memory.choose(wanted, candidates)
    best = with_setting(config, chosen.ds, chosen.mode, chosen.micro_batch)
    parameters, flops = sum(memory.sizes), model.flops_per_image()
    image_s = _image_s(words, config, flops, chosen.mode)
    steps = config.train.epochs * (words.images // config.train.global_batch)
    steps = min(steps, config.train.max_steps or steps)
    if not steps:
        raise ValueError(f"images={words.images} are less than one train.global_batch={config.train.global_batch}.")
    learned = dict(model.named_parameters())
    buffers = sum(buffer.nbytes for name, buffer in model.state_dict().items() if name not in learned)
    done = Plan(
        words, best, parameters, flops,
        [memory.row(ds, mode, chosen.micro_batch, candidates) for ds in memory.stages for mode in MODES],
        chosen, _asked_for(config, memory, candidates), image_s,
        None if image_s is None else step_of(
            best, parameters, words.gpus, accumulation(best, words.gpus), image_s, words.machine
        ),
        steps, -(-steps // config.train.save_every),
        checkpoint_bytes(parameters, buffers, best, words.gpus),
    )  # fmt: skip
    return done if image_s is None else _with_scaling(done, image_s)


def _image_s(words: Words, config: PretrainConfig, flops: int, mode: str) -> float | None:
    if words.img_s is not None:
        return 1 / words.img_s
    if config.precision == "fp32":  # no peak is known, as for the MFU of a run
        return None
    return seconds_per_image(flops, mode, PEAK_FLOPS[GPUS[words.gpu].peak], words.mfu)


def _asked_for(config: PretrainConfig, memory: Memory, candidates: list[int]) -> str:
    """Whether the run fits as its options stand."""
    size, mode = config.train.micro_batch, config.activation_checkpointing
    setting = f"ds={config.ds} train.micro_batch={size} activation_checkpointing={mode}"
    try:
        check_compile(config)
        accumulation(config, memory.words.gpus)
    except ValueError as error:
        return f"{setting}: {error}"
    row = memory.row(config.ds, mode, size, candidates)
    verdict = "fits" if row.total <= memory.words.budget else "does not fit"
    return f"{setting}: {row.total / 2**30:.1f} GiB, {verdict}."


def _with_scaling(done: Plan, image_s: float) -> Plan:
    """Adds steps on other numbers of nodes: strong, the same global batch; weak, the same share of each GPU."""
    words, config = done.words, done.config
    strong, weak = [], []
    for nodes in SCALING_NODES:
        gpus = nodes * words.gpus_per_node
        weak.append(step_of(config, done.parameters, gpus, accumulation(config, words.gpus), image_s, words.machine))
        share, rest = divmod(config.train.global_batch, gpus)
        sizes = [size for size in range(2, share + 1, 2) if share % size == 0 and size <= done.chosen.largest]
        if sizes and not rest:
            at = with_setting(config, config.ds, config.activation_checkpointing, sizes[-1])
            strong.append(step_of(at, done.parameters, gpus, share // sizes[-1], image_s, words.machine))
    return replace(done, strong=strong, weak=weak)
