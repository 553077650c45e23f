"""The options of a run: their names, types, defaults and checks (Hydra's schema). Those of fine-tuning alone are in
finetune_config.py."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def require(holds: bool, sentence: str) -> None:
    """ValueError with the sentence unless the condition holds."""
    if not holds:
        raise ValueError(sentence)


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless the option's value is one of the choices."""
    require(value in choices, f"{option}={value} must be one of {', '.join(choices)}.")


def given(option: str, value: str, meaning: str) -> None:
    """ValueError unless the option has a value; run_dir="$UNSET" has none."""
    require(bool(value), f"{option} is not set; add {option}=DIR, {meaning}.")


def positive(section: str, options: Any, names: str) -> None:
    """ValueError unless the options of these names, in a section, are above 0."""
    for name in names.split():
        value = getattr(options, name)
        require(value > 0, f"{section}.{name}={value} must be positive.")


def check_seed(option: str, seed: int) -> None:
    """ValueError unless the seed is one that every generator takes."""
    require(0 <= seed < 2**63, f"{option}{seed} must be a whole number from 0 to 2^63-1.")


@dataclass
class ModelConfig:
    """The pretraining model; the decoder is the paper's, but model=tiny brings a small one (launch/conf/decoder)."""

    encoder: str = "mixmim_base"
    img_size: int = 224
    mask_ratio: float = 0.5
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = True
    group_attention: bool = True  # False, an ablation: tokens of both mixed images attend to each other
    dual_reconstruction: bool = True  # False, an ablation: only what the mask hides of image i in mixed image i counts

    def __post_init__(self) -> None:
        positive("model", self, "img_size decoder_dim decoder_depth decoder_num_heads")
        require(0 < self.mask_ratio < 1, f"model.mask_ratio={self.mask_ratio} must lie between 0 and 1.")
        require(
            self.decoder_dim % self.decoder_num_heads == 0 and self.decoder_dim % 4 == 0,
            f"model.decoder_dim={self.decoder_dim} must be a multiple of 4 and of model.decoder_num_heads="
            f"{self.decoder_num_heads}.",
        )


@dataclass
class DataConfig:
    """The images and how they are cut; what follows from them is computed from (train.seed, step)."""

    kind: str = "folder"  # image files at any depth of `root`; shards: tar files; synthetic: random, for benchmarks
    root: str | None = None  # a folder; of shards a pattern, '/data/train-{000000..001281}.tar'; s3://bucket/... too
    index_dir: str = "~/.cache/mixmim_ds"  # where found images are remembered; every node must see it
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # share of the image's area
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width / height
    flip: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of pixels in 0..1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    threads: int = 0  # CPU threads that decode, per process; 0 = its share of the cores given to this job
    prefetch: int = 3  # micro-batches decoded ahead; 1 would leave the GPU waiting
    # Share of the data set that may turn out broken before the run ends. It is exact: below 1,000 images 0.001 is none.
    max_bad_share: float = 0.001
    synthetic_images: int = 1_281_167  # size of the epoch of data=synthetic

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, ("folder", "shards", "synthetic"))
        positive("data", self, "prefetch synthetic_images")
        require(0 <= self.threads <= 1024, f"data.threads={self.threads} must lie in 0 .. 1024; 0 = automatic.")
        require(0 <= self.max_bad_share <= 1, f"data.max_bad_share={self.max_bad_share} must lie in 0 .. 1.")
        for name in ("crop_scale", "crop_ratio"):
            ends = getattr(self, name)
            ordered = len(ends) == 2 and 0 < ends[0] <= ends[1]
            require(ordered, f"data.{name}={ends} must be two positive numbers, the smaller first.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(len(values) == 3, f"data.{name}={values} must be three numbers, of red, green and blue.")
        require(min(self.std) > 0, f"data.std={self.std} must be positive numbers.")
        require(self.crop_scale[1] <= 1, f"data.crop_scale={self.crop_scale} must not exceed 1, the whole image.")


@dataclass
class TrainConfig:
    """How long, how many at once, and what is written when."""

    epochs: int = 300
    max_steps: int | None = None  # end here, early; the schedule stays that of `epochs`
    global_batch: int = 2048  # images of one optimizer step, over all GPUs
    micro_batch: int = 128  # images of one forward pass on one GPU
    seed: int = 0
    log_every: int = 20  # steps, as all that follow
    save_every: int = 1000
    keep_last: int = 2  # rolling checkpoints that stay
    keep_every: int = 0  # checkpoints of these steps stay for ever; 0 = none
    picture_every: int = 1000  # reconstructions into TensorBoard; 0 = none
    profile: list[int] | None = None  # the first and the last step to trace into run_dir/profile; null = none
    max_failed_saves: int = 3  # in a row (disk full, run_dir read-only); the run ends at the last
    max_bad_steps: int = 0  # with a loss or gradient that is not finite, left out; the run ends at one more
    start_timeout_s: int = 1800  # until the first step is done (indexing, compiling)
    step_timeout_s: int = 600  # a collective that takes longer means that a rank is dead

    def __post_init__(self) -> None:
        positive("train", self, "epochs global_batch micro_batch log_every save_every start_timeout_s step_timeout_s")
        positive("train", self, "max_failed_saves")
        require(self.max_bad_steps >= 0, f"train.max_bad_steps={self.max_bad_steps} must not be negative.")
        require(self.max_steps is None or self.max_steps > 0, f"train.max_steps={self.max_steps} must be positive.")
        require(
            self.global_batch % self.micro_batch == 0,
            f"train.global_batch={self.global_batch} must be a multiple of train.micro_batch={self.micro_batch}.",
        )
        check_seed("train.seed=", self.seed)
        require(self.keep_last >= 2, f"train.keep_last={self.keep_last} must be at least 2; the newest may be damaged")
        require(
            self.keep_every >= 0 and self.keep_every % self.save_every == 0,
            f"train.keep_every={self.keep_every} must be 0 or a multiple of train.save_every={self.save_every}.",
        )
        require(self.picture_every >= 0, f"train.picture_every={self.picture_every} must be 0 (none) or positive.")
        ends = self.profile
        require(
            ends is None or (len(ends) == 2 and 0 < ends[0] <= ends[1] < ends[0] + 100),
            f"train.profile={ends} must be the first and the last of at most 100 steps, as in [101,105].",
        )


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up from 0, then half a cosine to min_lr."""

    base_lr: float = 1.5e-4  # per 256 images, see `peak_lr`
    min_lr: float = 0.0
    warmup_epochs: float = 40
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_grad: float | None = None  # largest norm of the whole gradient

    def __post_init__(self) -> None:
        positive("optim", self, "base_lr")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative.")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1).",
        )
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"optim.clip_grad={self.clip_grad} must be positive, or null for no clipping.",
        )


def peak_lr(base_lr: float, global_batch: int) -> float:
    """The linear scaling rule: the learning rate at the end of the warm-up."""
    return base_lr * global_batch / 256


@dataclass
class RunConfig:
    """What pretraining and fine-tuning have in common; the engine's mechanics are in `ds`."""

    run_dir: str = ""  # the folder that the run is kept in
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    resume: str = "auto"  # weights: where run_dir holds another run, set it aside and start anew from its weights
    ds: str = "zero1"  # a file of ds_configs/, or a path to another
    precision: str = "bf16"  # bf16 and fp16 keep fp32 masters in the optimizer
    compile: bool = False
    activation_checkpointing: str = "none"  # selective keeps the matrix products, full keeps block inputs only

    def __post_init__(self) -> None:
        for name, value in flatten(asdict(self)).items():
            numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, float)]
            require(all(map(math.isfinite, numbers)), f"{name}={value} must be finite.")
        require(
            self.data.kind == "synthetic" or bool(self.data.root),
            "data.root is not set; add data.root=DIR, the folder that holds the images"
            + (", or of tar files their pattern, data.root='DIR/*.tar'." if self.data.kind == "shards" else "."),
        )
        require(
            self.data.kind != "synthetic" or not self.data.root,
            "data.root has no effect with data=synthetic; remove it.",
        )
        one_of("resume", self.resume, ("auto", "weights"))
        one_of("precision", self.precision, ("bf16", "fp32", "fp16"))
        one_of("activation_checkpointing", self.activation_checkpointing, ("none", "selective", "full"))
        require(
            self.ds_path.is_file(),
            f"ds={self.ds} is no DeepSpeed config; choose one of "
            f"{', '.join(sorted(path.stem for path in (ROOT / 'ds_configs').glob('*.json')))} or give a path.",
        )

    @property
    def ds_path(self) -> Path:
        """The JSON file that `ds` names."""
        return Path(self.ds) if self.ds.endswith(".json") else ROOT / "ds_configs" / f"{self.ds}.json"


@dataclass
class ProbeConfig:
    """Labelled images to judge the features by while pretraining goes on (20 nearest neighbours, top-1)."""

    data: str | None = None  # DIR/train and DIR/val hold a folder for each class; null = none
    every: int = 10  # epochs

    def __post_init__(self) -> None:
        positive("probe", self, "every")


@dataclass
class PretrainConfig(RunConfig):
    """A pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        given("run_dir", self.run_dir, "the folder that the run is kept in")
        super().__post_init__()
        even(self.train, "images are mixed in pairs")


def even(train: TrainConfig, reason: str) -> None:
    """ValueError with the reason unless the micro-batch is even."""
    require(train.micro_batch % 2 == 0, f"train.micro_batch={train.micro_batch} must be even: {reason}.")


# What may change between two starts of one run: where it runs and what it writes, never what it computes. A data set
# may move: its fingerprint is compared instead of its path.
FREE = {
    "run_dir", "resume", "ds", "compile", "activation_checkpointing",
    "probe.data", "probe.every", "eval_every", "eval_only", "data.val", "augment.workers",
    "data.root", "data.index_dir", "data.threads", "data.prefetch", "data.max_bad_share",
    "train.max_steps", "train.log_every", "train.save_every", "train.keep_last", "train.keep_every",
    "train.picture_every", "train.profile", "train.max_failed_saves", "train.max_bad_steps",
    "train.start_timeout_s", "train.step_timeout_s",
}  # fmt: skip


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name: {"train": {"seed": 0}} -> {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if value and isinstance(value, dict) else {prefix + name: value}
    return flat


def identity(config: RunConfig) -> dict[str, Any]:
    """The options that decide what a run computes; a run folder holds one value of each."""
    return {name: value for name, value in flatten(asdict(config)).items() if name not in FREE}
