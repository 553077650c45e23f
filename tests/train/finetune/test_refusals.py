"""Mistakes of those who fine-tune."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from launching import tasks
from timm.models._hub import save_for_hf
from tuning import SCRIPT

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.models import Classifier
from mixmim_ds.train.finetune import load_init


def one_class(root: Path) -> None:
    for part in ("train", "val"):
        shutil.move(min((root / part).iterdir()), root / "kept")
        shutil.rmtree(root / part)
        (root / part).mkdir()
        shutil.move(root / "kept", root / part / "kept")


def other_class(root: Path) -> None:
    next((root / "val").iterdir()).rename(root / "val" / "zebra")


def bare_image(root: Path) -> None:
    (root / "train" / "bare.png").symlink_to(next((root / "train").glob("*/*.png")))


MISTAKES: dict[str, tuple[Callable[[Path], None] | str, str]] = {
    "val has another class": (other_class, "have the class zebra, which those to learn from lack"),
    "one class": (one_class, "holds one class to learn from, kept; give at least two"),
    "no label": (bare_image, "train have no class, the first is bare.png"),
    "init of another size": ("init=RUN model=base model.img_size=224", "holds mixmim_tiny, not mixmim_base"),
    "init is nothing": ("init=nowhere", "init: nowhere is no folder"),
    "init has no classifier": ("init=random:tiny eval_only=true run_dir=", "init=random:tiny tells 0 classes"),
    "no init": ("init=", "init is not set; add init=DIR, an exported folder or a run"),
    "odd micro-batch": ("train.micro_batch=15 train.global_batch=30", "augment.cutmix mix images in pairs"),
    "words that timm does not know": ("augment.rand_augment=auto", "augment.rand_augment=auto is not what timm"),
    "no labels in random pixels": ("data=synthetic", "data=synthetic has no labels"),
    "an option of pretraining": ("model.mask_ratio=0.5", "model.mask_ratio is no option"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, labelled: Path, options: list[str], straight: Path, tmp_path: Path
) -> None:
    change, sentence = MISTAKES[mistake]
    words = [*options, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    if isinstance(change, str):
        words += change.replace("RUN", str(straight)).split()
    else:
        shutil.copytree(labelled, tmp_path / "data", symlinks=True)
        change(tmp_path / "data")
        words += [f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    printed = tasks(*words, processes=1, code=2, script=SCRIPT)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0] and "Traceback" not in printed, printed


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ({"depths": (1, 1, 2, 1)}, "TIMM holds a mixmim_tiny of other depths or widths than the name has; give one of"),
        ({"depths": (1, 1, 6, 1)}, "TIMM holds a mixmim_tiny of other depths or widths"),
        ({"in_chans": 1}, "init: TIMM takes 1 channels, images have 3; give an encoder of 3."),
    ],
)
def test_what_timm_made_another_way_is_no_init(
    made: dict[str, object], sentence: str, options: list[str], tmp_path: Path
) -> None:
    save_for_hf(timm.create_model("mixmim_tiny", img_size=64, num_classes=13, **made), tmp_path)
    config = load_finetune_config([*options, "run_dir=UNUSED", f"init={tmp_path}"])
    with pytest.raises(ValueError) as error:
        load_init(Classifier("mixmim_tiny", 64, 13), config, [])
    assert sentence.replace("TIMM", str(tmp_path)) in str(error.value)


def test_a_run_goes_on_with_its_own_init_alone(straight: Path, options: list[str]) -> None:
    printed = tasks(*options, f"init={straight}", f"run_dir={straight}", processes=1, code=2, script=SCRIPT)
    assert f"run_dir={straight} holds a run with init=random, not {straight}" in printed.splitlines()[-1]
