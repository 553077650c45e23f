"""The options that fine-tuning has beside those of every run (config.py)."""

from dataclasses import dataclass, field

from mixmim_ds.config import DataConfig, OptimConfig, RunConfig, even, given, positive, require


@dataclass
class ClassifierConfig:
    """The encoder and its classifier."""

    encoder: str = "mixmim_base"
    img_size: int = 224
    drop_path: float = 0.1  # chance that an image skips a branch of the last block; it grows linearly from 0

    def __post_init__(self) -> None:
        positive("model", self, "img_size")
        require(0 <= self.drop_path < 1, f"model.drop_path={self.drop_path} must lie in 0 .. 1, 1 excluded.")


@dataclass
class LabelledDataConfig(DataConfig):
    """Images to learn from, in DIR/train for data.root=DIR, and images to judge by."""

    val: str | None = None  # folder or pattern of the latter; null = DIR/val

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind != "synthetic", "data=synthetic has no labels; give data.root=DIR.")
        require(
            self.kind != "shards" or bool(self.val), "data.val is not set; with data=shards give its pattern as well."
        )


@dataclass
class AugmentConfig:
    """What timm does to decoded images, and to batches of them; the authors' values."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's words (timm.data.rand_augment_transform); null = none
    erase: float = 0.25  # share of the images that get a rectangle of noise
    mixup: float = 0.8  # alpha, as of cutmix; a micro-batch gets one of the two; 0 = none
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    workers: int = 0  # processes for rand_augment beside each process; 0 = its share of the cores given to this job

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "workers"):
            require(getattr(self, name) >= 0, f"augment.{name}={getattr(self, name)} must not be negative.")
        for name in ("erase", "label_smoothing"):
            require(
                0 <= getattr(self, name) < 1, f"augment.{name}={getattr(self, name)} must lie in 0 .. 1, 1 excluded."
            )


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """As in pretraining, and what only fine-tuning has."""

    layer_decay: float = 0.7  # each layer learns with this share of the next one's learning rate
    ema_decay: float | None = None  # judge and export a moving average of the weights, with this decay per step

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay} must lie in 0 .. 1, 0 excluded.")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"optim.ema_decay={self.ema_decay} must lie between 0 and 1, or be null for none.",
        )


@dataclass
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    init: str = ""  # an exported folder, a run or one of its checkpoints; random = from scratch
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    eval_every: int = 1  # epochs
    eval_only: bool = False  # judge the classifier that init is, and stop

    def __post_init__(self) -> None:
        meaning = "an exported folder or a run to start from, or init=random to start from scratch"
        given("init", self.init, meaning)
        super().__post_init__()
        if not self.eval_only:
            given("run_dir", self.run_dir, "the folder that the run is kept in")
        require(
            not (self.run_dir and self.eval_only),
            f"run_dir={self.run_dir} has no effect with eval_only=true; remove it.",
        )
        require(self.eval_every > 0, f"eval_every={self.eval_every} must be positive.")
        if self.augment.mixup or self.augment.cutmix:
            even(self.train, "augment.mixup and augment.cutmix mix images in pairs")
