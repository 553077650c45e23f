"""Files of the authors and of OpenMMLab as our models, and back."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import reference
import timm
import torch
from foreign_files import Layout, random_params, swap_halves
from reference import Params
from torch import nn

from mixmim_ds.export.official import build_official, load_official, save_official
from mixmim_ds.models import MixMIM, MixMIMTransformer

DEPTHS, WINDOWS, HEADS = (1, 1, 4, 1), (8, 8, 4, 2), (1, 2, 4, 8)  # of mixmim_tiny at 64 pixels
PRETRAINING = Layout(DEPTHS, WINDOWS, decoder_depth=2)
FINE_TUNED = Layout(DEPTHS, WINDOWS, head=True)
SHAPE = reference.Shape(32, DEPTHS, HEADS, WINDOWS, decoder_depth=2, decoder_num_heads=4)
LAYOUTS = {"authors": ("model", foreign_files.authors), "openmmlab": ("state_dict", foreign_files.openmmlab)}
# Float64 on both sides, sums in another order.
EXACT = {"rtol": 0, "atol": 1e-10}


def mixmim(dtype: torch.dtype = torch.float32) -> MixMIM:
    return MixMIM("mixmim_tiny", 64, decoder_dim=64, decoder_depth=2, decoder_num_heads=4).to(dtype)


def encoder(num_classes: int = 0, img_size: int = 64, dtype: torch.dtype = torch.float32) -> MixMIMTransformer:
    return timm.create_model("mixmim_tiny", img_size=img_size, num_classes=num_classes).to(dtype).eval()


def write(path: Path, style: str, params: Params, layout: Layout, **others: Any) -> Path:
    key, convert = LAYOUTS[style]
    torch.save({key: convert(params, layout), **others}, path)
    return path


def pretraining_file(path: Path, style: str = "authors") -> Path:
    return write(path, style, random_params(mixmim()), PRETRAINING)


def fine_tuned_file(path: Path, style: str = "authors", classes: int = 5) -> Path:
    return write(path, style, random_params(encoder(classes), "encoder."), FINE_TUNED)


def assert_refused(model: nn.Module, path: Path, sentence: str) -> None:
    """One sentence, which names the file; and the model is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_official(model, path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("style", LAYOUTS)
@pytest.mark.parametrize("table", [dict, swap_halves])
def test_pretraining_file_computes_the_method(style: str, table: Callable[[Params], Params], tmp_path: Path) -> None:
    model = mixmim(torch.float64)
    params = table(random_params(model, dtype=torch.float64))
    load_official(model, write(tmp_path / "a.pth", style, params, PRETRAINING))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    loss, prediction = model(images, mask)
    expected_loss, expected = reference.forward(params, images, mask, SHAPE)
    torch.testing.assert_close(prediction, expected, **EXACT)
    torch.testing.assert_close(loss, expected_loss, **EXACT)


@pytest.mark.parametrize("style", LAYOUTS)
@pytest.mark.parametrize("table", [dict, swap_halves])
def test_encoder_takes_its_part_of_a_pretraining_file(
    style: str, table: Callable[[Params], Params], tmp_path: Path
) -> None:
    params = table(random_params(mixmim(), dtype=torch.float64))
    model = encoder(dtype=torch.float64)
    fresh = model.absolute_pos_embed.clone()
    load_official(model, write(tmp_path / "a.pth", style, params, PRETRAINING))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model.forward_features(images), reference.encode(params, images, SHAPE), **EXACT)
    # Only for the swapped table does the stored one matter; float32 is what the fresh one was computed in.
    assert torch.allclose(fresh, model.absolute_pos_embed, atol=1e-6) == (table is dict)


@pytest.mark.parametrize("style", LAYOUTS)
def test_fine_tuned_file_gives_the_logits(style: str, tmp_path: Path) -> None:
    model = encoder(5, dtype=torch.float64)
    params = random_params(model, "encoder.", torch.float64)
    load_official(model, write(tmp_path / "a.pth", style, params, FINE_TUNED))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pooled = reference.encode(params, images, SHAPE).mean(dim=(1, 2))
    torch.testing.assert_close(model(images), reference.linear(params, "encoder.head.fc", pooled), **EXACT)


def test_patch_merging_computes_what_openmmlabs_does(tmp_path: Path) -> None:
    model = encoder(dtype=torch.float64)
    params = random_params(mixmim(), dtype=torch.float64)
    path = write(tmp_path / "a.pth", "openmmlab", params, PRETRAINING)
    load_official(model, path)
    state = torch.load(path)["state_dict"]
    for stage in range(3):
        tokens = torch.randn(2, 6, 4, 32 << stage, dtype=torch.float64)
        expected = foreign_files.openmmlab_merging(state, stage, tokens)
        # The same numbers summed in another order.
        torch.testing.assert_close(model.layers[stage + 1].downsample(tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("classes", "file"), [(0, pretraining_file), (5, fine_tuned_file)])
@pytest.mark.parametrize("style", LAYOUTS)
def test_written_again_it_is_the_authors_file(
    style: str, classes: int, file: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    model = encoder(classes) if classes else mixmim()
    load_official(model, file(tmp_path / "a.pth", style))
    save_official(model, tmp_path / "b.pth")
    written = torch.load(tmp_path / "b.pth")
    expected = torch.load(file(tmp_path / "authors.pth", "authors"))["model"]
    assert written.keys() == {"model"} and written["model"].keys() == expected.keys()
    assert all(value.dtype == expected[name].dtype for name, value in written["model"].items())
    assert all(torch.equal(value, expected[name]) for name, value in written["model"].items())
    assert set(os.listdir(tmp_path)) == {"a.pth", "authors.pth", "b.pth"}


def test_published_sizes_are_recognised(tmp_path: Path) -> None:
    with torch.device("meta"):
        pretraining, fine_tuned = MixMIM("mixmim_base"), timm.create_model("mixmim_base_384")
    params = random_params(pretraining)
    assert sum(value.numel() for value in params.values()) == 114_665_784  # METHOD's count of B
    layout = Layout((2, 2, 18, 2), (14, 14, 14, 7), decoder_depth=8)
    model = build_official(write(tmp_path / "a.pth", "openmmlab", params, layout))
    assert isinstance(model, MixMIM) and model.grid == (7, 7)
    assert torch.equal(model.decoder_blocks[7].mlp.fc2.weight, params["decoder_blocks.7.mlp.fc2.weight"])

    params = random_params(fine_tuned, "encoder.")
    assert sum(value.numel() for value in params.values()) == 89_577_440  # METHOD's count of B at 384
    layout = Layout((2, 2, 18, 2), (16, 16, 24, 12), head=True)
    model = build_official(write(tmp_path / "a.pth", "authors", params, layout))
    assert isinstance(model, MixMIMTransformer) and model.pretrained_cfg["architecture"] == "mixmim_base_384"
    assert all(torch.equal(value, params[f"encoder.{name}"]) for name, value in model.state_dict().items())


def test_head_is_left_out_or_kept_by_num_classes(tmp_path: Path) -> None:
    plain, model = encoder(), encoder(7)
    load_official(plain, fine_tuned_file(tmp_path / "a.pth"))
    assert isinstance(plain.head.fc, nn.Identity)
    own = model.head.fc.weight.clone()
    load_official(model, pretraining_file(tmp_path / "b.pth"))
    assert torch.equal(model.head.fc.weight, own)
    assert_refused(model, tmp_path / "a.pth", "head of 5 classes and the model num_classes=7; .* num_classes=0")


def test_files_of_others_kinds_are_refused(tmp_path: Path) -> None:
    assert_refused(mixmim(), fine_tuned_file(tmp_path / "a.pth"), "without decoder, so it cannot fill a MixMIM")
    other = encoder(img_size=96)
    assert_refused(other, tmp_path / "a.pth", "img_size=64 and .* img_size=96x96; create .* set_input_size")
    assert_refused(timm.create_model("mixmim_base", num_classes=0), tmp_path / "a.pth", "of another shape: .*, ...")
    torch.save({"model": timm.create_model("resnet18").state_dict()}, tmp_path / "b.pth")
    assert_refused(encoder(), tmp_path / "b.pth", "no MixMIM checkpoint: it has no absolute_pos_embed")
    with torch.device("meta"):
        narrow = MixMIMTransformer(64, num_classes=0, embed_dim=64, depths=(1, 1, 1, 1), window_size=(8, 8, 4, 2))
    params = random_params(narrow, "encoder.")
    write(tmp_path / "c.pth", "authors", params, Layout((1, 1, 1, 1), WINDOWS))
    with pytest.raises(ValueError, match=r"\[1, 256, 64\], which is of no registered encoder"):
        build_official(tmp_path / "c.pth")


def rename(state: Params, old: str, new: str) -> None:
    state[new] = state.pop(old)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: s.pop("norm.weight"), r"\(1 lacking: norm.weight\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"\(1 unknown: extra\)"),
        (lambda s: rename(s, "head.bias", "head.bias2"), "1 lacking: head.fc.bias; 1 unknown: head.fc.bias2"),
        (lambda s: s.pop("head.weight"), "1 lacking: head.fc.weight"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"1 of another shape: norm.bias \[3\] for \[256\]"),
        (lambda s: [s.pop(n) for n in list(s) if "qkv" in n], r"14 lacking: (layers\S+qkv\S+, ){3}\.\.\.\)"),
        (lambda s: [s.update({n: s[n].T}) for n in s if n.endswith("_index")], "orders the relative positions"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(damage: Callable[[Params], Any], sentence: str, tmp_path: Path) -> None:
    model = encoder(5)
    state = foreign_files.authors(random_params(model, "encoder."), FINE_TUNED)
    damage(state)
    torch.save({"model": state}, tmp_path / "a.pth")
    assert_refused(model, tmp_path / "a.pth", sentence)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    assert_refused(encoder(), tmp_path / "a.pth", "is no file")
    (tmp_path / "a.pth").write_bytes(b"PK")
    assert_refused(mixmim(), tmp_path / "a.pth", "cannot be read as a checkpoint")


def test_indices_are_derived_where_a_file_has_none(tmp_path: Path) -> None:
    model = encoder(5)
    params = random_params(model, "encoder.")
    state = foreign_files.authors(params, FINE_TUNED)
    torch.save({name: value for name, value in state.items() if "_index" not in name}, tmp_path / "a.pth")
    load_official(model, tmp_path / "a.pth")
    assert torch.equal(model.norm.weight, params["encoder.norm.weight"])


def test_a_file_is_replaced_by_a_whole_one_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fine_tuned_file(tmp_path / "a.pth")
    before = path.read_bytes()

    def disk_full(content: Any, draft: Path) -> None:
        Path(draft).write_bytes(b"half")
        raise RuntimeError("[enforce fail] file write failed\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(ValueError, match=re.escape(f"{path} cannot be written ([enforce fail] file write failed)")):
            save_official(encoder(5), path)
    assert os.listdir(tmp_path) == ["a.pth"] and path.read_bytes() == before
    with pytest.raises(ValueError, match=r"none/b.pth cannot be written \(.+\); choose another place"):
        save_official(encoder(5), tmp_path / "none" / "b.pth")
    model = encoder(5)
    with path.open("rb") as reader:
        save_official(model, path)
        assert reader.read() == before, "whoever has the old file open still reads the old one"
    assert os.listdir(tmp_path) == ["a.pth"]
    assert torch.equal(torch.load(path)["model"]["head.weight"], model.head.fc.weight)


def test_a_view_into_a_large_buffer_is_saved_without_it(tmp_path: Path) -> None:
    model = encoder(5)
    flat = torch.zeros(10_000_000)
    model.norm.weight.data = flat[: model.norm.weight.numel()]
    save_official(model, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < flat.nbytes


def test_weights_take_the_models_type(tmp_path: Path) -> None:
    model = encoder(5, dtype=torch.bfloat16)
    load_official(model, fine_tuned_file(tmp_path / "a.pth"))
    expected = torch.load(tmp_path / "a.pth")["model"]["head.weight"].bfloat16()
    assert torch.equal(model.head.fc.weight, expected)
