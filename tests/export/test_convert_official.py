"""launch/convert.py between the authors' files, timm folders and runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from launching import converted, refusal
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from mixmim_ds.evaluate.features import load_encoder
from mixmim_ds.export.official import load_official, save_official
from mixmim_ds.export.pretrained import load_pretrained
from mixmim_ds.models import MixMIM, MixMIMTransformer

pytestmark = pytest.mark.slow
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fine_tuned(tmp_path: Path) -> tuple[MixMIMTransformer, Path]:
    """A classifier and its file in the authors' layout."""
    torch.manual_seed(0)
    encoder = timm.create_model("mixmim_tiny", img_size=64, num_classes=5).eval()
    save_official(encoder, tmp_path / "fine_tuned.pth")
    return encoder, tmp_path / "fine_tuned.pth"


def test_a_run_goes_to_the_authors_layout_and_back(stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    run = stage_run("zero1", "fp32")
    first = converted("--to-official", run, tmp_path / "first.pth")
    folder = converted("--from-official", first, tmp_path / "timm", "--with-decoder")
    second = converted("--to-official", folder, tmp_path / "second.pth")
    expected, found = torch.load(first)["model"], torch.load(second)["model"]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    direct = converted(run, tmp_path / "direct", "--with-decoder")
    for name in ("model.safetensors", "decoder.safetensors"):
        expected, found = load_file(direct / name), load_file(folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    model = MixMIM("mixmim_tiny", 64, decoder_dim=256, decoder_depth=2, decoder_num_heads=8)
    load_official(model, second)
    _, working = torch.load(run / "live.pt")
    for whole in (model, load_pretrained(folder).model, load_pretrained(direct).model):
        assert all(torch.equal(parameter, working[name]) for name, parameter in whole.named_parameters())


def test_a_fine_tuned_file_keeps_its_head(fine_tuned: tuple[MixMIMTransformer, Path], tmp_path: Path) -> None:
    encoder, file = fine_tuned
    folder = converted("--from-official", file, tmp_path / "timm")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), encoder(IMAGES))
    card = (folder / "README.md").read_text()
    assert "5 classes" in card and "\npipeline_tag: image-classification\n" in card and "\nlicense: unknown\n" in card


def test_the_number_of_classes_is_left_to_who_loads_it(
    fine_tuned: tuple[MixMIMTransformer, Path], tmp_path: Path
) -> None:
    encoder, file = fine_tuned
    folder = converted("--from-official", file, tmp_path / "timm")
    name = f"local-dir:{folder}"
    with torch.no_grad():
        features = encoder.forward_features(IMAGES)
        for classes in (None, 5, 0, 7):
            loaded = timm.create_model(name, pretrained=True, num_classes=classes).eval()
            assert loaded.num_classes == (5 if classes is None else classes)
            assert torch.equal(loaded.forward_features(IMAGES), features)
            assert torch.equal(loaded(IMAGES), encoder(IMAGES)) or classes in (0, 7)
        backbone = timm.create_model(name, pretrained=True, features_only=True).eval()
        expected = encoder.forward_intermediates(IMAGES, intermediates_only=True)
        assert all(map(torch.equal, backbone(IMAGES), expected))
    config = json.loads((folder / "config.json").read_text())
    for classes in (0, config["num_classes"]):  # as transformers does it, for AutoModel and for a classifier
        model = timm.create_model(config["architecture"], num_classes=classes, **config["model_args"])
        left = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not left.missing_keys


def test_mistakes_are_one_sentence(fine_tuned: tuple[MixMIMTransformer, Path], tmp_path: Path) -> None:
    _, file = fine_tuned
    content = file.read_bytes()
    assert "holds no decoder" in refusal("--from-official", file, tmp_path / "out", "--with-decoder")
    assert "is no file" in refusal("--from-official", tmp_path, tmp_path / "out")
    assert "have no effect with --to-official" in refusal("--to-official", tmp_path, tmp_path / "out", "--dtype=bf16")
    assert "let it end in .pth" in refusal("--to-official", tmp_path, tmp_path / "out.safetensors")
    assert "exists already" in refusal("--to-official", tmp_path, file)
    assert file.read_bytes() == content and not list(tmp_path.glob("out*"))


def test_an_export_is_known_as_one(fine_tuned: tuple[MixMIMTransformer, Path], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    save_for_hf(fine_tuned[0], folder, safe_serialization=True)
    assert "export is an export already; give the run that it was made of." in refusal(folder, tmp_path / "out")
    said = refusal("--from-official", folder / "model.safetensors", tmp_path / "out")
    assert "model.safetensors is in timm's layout already; give it to timm.create_model as checkpoint_path." in said
    assert not (tmp_path / "out").exists()


def spoil(folder: Path, how: str) -> str:
    """Makes an export something else; returns what is to be said of it."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "no weights":
        weights.unlink()
        return "is no whole export"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "is no whole export"
    if how == "another program's":
        config.write_text('{"model_type": "vit"}')
        return "is no whole export"
    save_for_hf(timm.create_model("resnet18", num_classes=3), str(folder), safe_serialization=True)
    return "holds resnet18, which is no MixMIM encoder"


@pytest.mark.parametrize("how", ["no weights", "cut off", "another program's", "another model's"])
def test_what_is_no_whole_export_is_one_sentence(
    how: str, fine_tuned: tuple[MixMIMTransformer, Path], tmp_path: Path
) -> None:
    folder = converted("--from-official", fine_tuned[1], tmp_path / "timm")
    said = spoil(folder, how)
    assert f"{folder} {said}" in refusal("--to-official", folder, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(ValueError, match=f"^init: {folder} {said}[^\n]*$"):
        load_encoder(str(folder), 0, "init", head=True)
