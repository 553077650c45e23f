"""Fine-tuning: a classifier on an encoder, judged by the images of a second set."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mixmim_ds.checkpoints import steps_of
from mixmim_ds.data.augment import RandAugmentPool
from mixmim_ds.data.central import CentralBatches, tell_left_out
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.data.labelled_loader import LabelledBatch, LabelledLoader
from mixmim_ds.data.loader import Normalise, Share
from mixmim_ds.data.recover import DataFailed
from mixmim_ds.device import DTYPES
from mixmim_ds.evaluate.accuracy import count, scores
from mixmim_ds.evaluate.features import load_encoder, normalise_of, side_of
from mixmim_ds.evaluate.pictures import Picture, draw_batch
from mixmim_ds.export.to_timm import Form, export_run
from mixmim_ds.finetune_config import FinetuneConfig
from mixmim_ds.models import Classifier, MixMIMTransformer
from mixmim_ds.train.bad_images import check_judged
from mixmim_ds.train.distributed import (
    RankFailed,
    RunFailed,
    World,
    connected,
    made_once,
    on_every_rank,
    on_first_rank,
    rank_before_connecting,
    share_of_cores,
)
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.images import find_labelled
from mixmim_ds.train.loop import Judge, Task, conduct
from mixmim_ds.train.optim import layer_scale
from mixmim_ds.train.restore import load_weights
from mixmim_ds.train.run_folder import facts_of
from mixmim_ds.train.run_log import log_failure
from mixmim_ds.zero_files import read_saved

EXPORT = "timm"  # folder in the run folder
RANDOM = "random"
log = logging.getLogger("mixmim_ds")


def finetune(config: FinetuneConfig) -> int:
    """Fine-tunes until the end or a request to stop; the exit code of the process. Raises as `conduct`.

    At the end the best checkpoint is exported to run_dir/timm.
    """
    pool = _open_pool(config)
    try:
        code = conduct(config, lambda world: _prepare(config, world, pool))
    finally:
        if pool:
            pool.close()
    if code == 0 and rank_before_connecting() == 0:
        _export(Path(config.run_dir))
    return code


def evaluate(config: FinetuneConfig) -> int:
    """Judges the classifier that `init` is, on all processes; prints its scores as JSON on the last line.

    Raises:
        ValueError: it has no classifier, or not one for the classes of the data, or takes no squares.
        RankFailed: the images cannot be read any more.
    """
    with connected(config.train.start_timeout_s) as world:
        train, val = find_labelled(config.data, world)
        encoder = made_once(world, lambda: load_encoder(config.init, config.train.seed, "init", head=True))
        if not tells(encoder, train.classes):
            raise ValueError(
                f"init={config.init} tells {encoder.num_classes} classes, which are not the {len(train.classes)} of "
                f"data.root={config.data.root}; give a model that was fine-tuned on these."
            )
        normalise = normalise_of(encoder, world.device)
        try:
            found = _score(config, world, val, encoder.to(world.device).eval(), normalise)
        except DataFailed as error:
            raise RankFailed(str(error)) from error
        if world.first:
            print(json.dumps({"init": config.init} | found))
    return 0


def tells(encoder: MixMIMTransformer, classes: list[str]) -> bool:
    """Whether the encoder has a classifier of these classes; of one that does not name its own, as in the authors'
    files, the number decides."""
    names = encoder.pretrained_cfg.get("label_names") or classes
    return encoder.num_classes == len(classes) and list(names) == classes


def _open_pool(config: FinetuneConfig) -> RandAugmentPool | None:
    words = config.augment.rand_augment
    if words is None:
        return None
    return RandAugmentPool(words, config.model.img_size, config.data.mean, config.augment.workers or share_of_cores())


def _prepare(config: FinetuneConfig, world: World, pool: RandAugmentPool | None) -> Task:
    share = Share(world.rank, world.size, accumulation(config, world.size))
    train, val = find_labelled(config.data, world)
    torch.manual_seed(config.train.seed)
    options = config.model
    model = Classifier(options.encoder, options.img_size, len(train.classes), options.drop_path)
    begin = None if config.init == RANDOM else partial(_begin_with_init, model, config, train.classes, world)
    if begin and not on_first_rank(world, lambda: bool(steps_of(Path(config.run_dir)))):
        begin()  # here already, for a mistake must not leave a run folder behind
        begin = None
    loader = LabelledLoader(config, train, share, world.device, share_of_cores(), pool)
    scale_of = partial(layer_scale, depths=model.depths, decay=config.optim.layer_decay)
    judge = Judge(config.eval_every * loader.plan.steps_per_epoch, _scores_of(config, world, val), best_by="top1")

    def picture(batch: LabelledBatch, logits: Tensor) -> Picture:
        pixels = draw_batch(batch.images, config.data.mean, config.data.std)
        return Picture("augmented", pixels, "training images as the model takes them")

    return Task(
        config, options.encoder, model, loader, train.images, facts_of(train), picture, scale_of,
        config.optim.ema_decay, judge, begin,
    )  # fmt: skip


def _begin_with_init(model: Classifier, config: FinetuneConfig, classes: list[str], world: World) -> None:
    origin = on_every_rank(world, lambda: load_init(model, config, classes))[0]
    if world.first:
        print(f"the classifier is {origin}", flush=True)


def load_init(model: Classifier, config: FinetuneConfig, classes: list[str]) -> str:
    """Gives the model the encoder that `init` names, its tables interpolated to the model's image size, and the
    classifier if it tells the same classes.

    Returns:
        words that say where the classifier is from.

    Raises:
        ValueError: there is none, or it is of another size.
    """
    source = load_encoder(config.init, config.train.seed, "init", head=True)
    if _shapes(source) != _shapes(model.encoder):
        name, asked = source.pretrained_cfg["architecture"], config.model.encoder
        raise ValueError(
            f"init={config.init} holds {name}, not {asked}; take the model option that fits it."
            if name != asked
            else f"init={config.init} holds a {name} of other depths or widths than the name has; give one of them."
        )
    known = tells(source, classes) and source.global_pool == model.encoder.global_pool
    head = {} if known else {name: p for name, p in model.encoder.state_dict().items() if name.startswith("head.")}
    model.encoder.load_state_dict(source.state_dict() | head)
    if not known:
        return f"new, the encoder that of init={config.init}"
    if source.pretrained_cfg.get("label_names"):
        return f"that of init={config.init}"
    return f"that of init={config.init}, which names no classes: they are taken for those of data.root, in their order"


def _shapes(encoder: MixMIMTransformer) -> dict[str, torch.Size]:
    """Of the parameters that neither the image size nor the classes change."""
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    return {name: shape for name, shape in shapes.items() if "bias_table" not in name and not name.startswith("head.")}


def _scores_of(config: FinetuneConfig, world: World, val: Labelled) -> Callable[[Path], dict[str, float]]:
    """Judges a checkpoint by the weights that an export of it would hold, in a model beside the engine's."""
    options = config.model
    model = Classifier(options.encoder, options.img_size, len(val.classes)).to(world.device).eval()
    normalise = Normalise(config.data.mean, config.data.std, world.device)
    broken: dict[int, str] = {}  # what is need not be found each time

    def judge(path: Path) -> dict[str, float]:
        load_weights(model, made_once(world, lambda: read_saved(path)).averaged)
        return _score(config, world, val, model.encoder, normalise, broken)

    return judge


def _score(
    config: FinetuneConfig, world: World, val: Labelled, encoder: MixMIMTransformer, normalise: Normalise,
    broken: dict[int, str] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Of all images that can be decoded, shared out among the ranks; in half precision where the run is.

    Args:
        broken: as of `CentralBatches`.

    Raises:
        RunFailed: too many cannot be (`data.max_bad_share`).
    """
    dtype = DTYPES[config.precision]
    size, threads = side_of(encoder), config.data.threads or share_of_cores()

    def classify(images: Tensor) -> Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not torch.float32):
            return encoder(images)

    batches = CentralBatches(
        val.images, size, normalise, world.device, threads, config.train.micro_batch, world.rank, world.size, broken
    )
    found = on_every_rank(world, lambda: (count(classify, batches, val.labels), batches.left_out))
    if world.first:
        tell_left_out(left_out for _, left_out in found)
    check_judged(config.data, val.images, sum(counts.images for counts, _ in found))
    return scores([counts for counts, _ in found])


def _export(run_dir: Path) -> None:
    """The best checkpoint as a timm model with its classifier; it replaces that of a shorter run. RunFailed if that
    cannot be done."""
    out = run_dir / EXPORT
    scratch = out.with_name(f"{EXPORT}.new")
    fresh = scratch / EXPORT  # by its final name already, which the model card tells
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        exported = export_run(run_dir, fresh, Form())
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
        scratch.rmdir()
    except (OSError, ValueError) as error:
        failure = RunFailed(f"the run is done but not exported to {out} ({error}); the same command tries it again.")
        log_failure(failure, 0)
        raise failure from error
    log.info("exported %s to %s", exported.path.name, out)
