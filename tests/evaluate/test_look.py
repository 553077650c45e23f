"""Looking at images through a model: pairs against the plan and plain arithmetic, neighbours, and the command."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import converted, typed
from PIL import Image
from safetensors.torch import load_file, save_file

from mixmim_ds.config import DataConfig, ModelConfig
from mixmim_ds.data.plan import mask_at
from mixmim_ds.evaluate.look import as_the_model_takes_them, draw_pairs, find_files, find_neighbours, read_images
from mixmim_ds.evaluate.pictures import GAP
from mixmim_ds.export.pretrained import Pretrained, load_pretrained
from mixmim_ds.models import build_model

SIDE = 64


@pytest.fixture(scope="module")
def untrained() -> Pretrained:
    options = ModelConfig("mixmim_tiny", SIDE, decoder_dim=64, decoder_depth=1, decoder_num_heads=2)
    torch.manual_seed(0)
    return Pretrained(build_model(options).eval(), options, DataConfig().mean, DataConfig().std)


def files_of(photographs: Path, count: int) -> list[Path]:
    """Crops of different photographs, in turn."""
    classes = [sorted(folder.iterdir()) for folder in sorted(photographs.iterdir()) if folder.is_dir()]
    return [classes[i % len(classes)][i // len(classes)] for i in range(count)]


def test_pairs_are_drawn_with_the_masks_of_a_run_and_the_last_odd_one_goes_with_the_first(
    untrained: Pretrained, photographs: Path
) -> None:
    pixels = read_images(files_of(photographs, 5), SIDE)
    images = as_the_model_takes_them(untrained, pixels)
    drawn = draw_pairs(untrained, images, rows=8, seed=7)
    assert len(drawn) == 3 and len(draw_pairs(untrained, images, rows=2, seed=7)) == 2
    masks = [mask_at(7, 0, k, (2, 2), 0.5) for k in range(3)]
    assert any((mask != masks[0]).any() for mask in masks), "each pair has a mask of its own"
    for (first, second), mask, strip in zip(((0, 1), (2, 3), (4, 0)), masks, drawn, strict=True):
        a, b, mixed, shown, painted_a, painted_b = strip.split(SIDE + GAP, dim=2)
        a, b, mixed, shown, painted_a = (each[:, :, :SIDE] for each in (a, b, mixed, shown, painted_a))
        from_b = torch.from_numpy(mask.repeat(32, 0).repeat(32, 1))
        assert (a.int() - pixels[first].int()).abs().max() <= 1 and (b.int() - pixels[second].int()).abs().max() <= 1
        assert torch.equal(shown, from_b.to(torch.uint8).mul(255).expand(3, -1, -1))
        assert torch.equal(mixed, b.where(from_b, a))
        assert torch.equal(painted_a.where(~from_b, a), a) and not torch.equal(painted_a, a)
        assert torch.equal(painted_b.where(from_b, b), b) and not torch.equal(painted_b, b)


def test_the_nearest_of_an_image_is_its_copy_and_never_itself(untrained: Pretrained, photographs: Path) -> None:
    pixels = read_images(files_of(photographs, 20), SIDE)
    pixels[13] = (pixels[2] * 0.97).to(torch.uint8)
    images = as_the_model_takes_them(untrained, pixels)
    places, cosines = find_neighbours(untrained, images, rows=6, count=4)
    assert places.shape == cosines.shape == (6, 4)
    assert places[2, 0] == 13 and cosines[2, 0] > 0.99
    assert (places != torch.arange(6)[:, None]).all() and (cosines.diff(dim=1) <= 0).all()
    with torch.no_grad():
        vectors = untrained.model.encoder.forward_features(images).mean((1, 2)).double().numpy()
    exact = vectors @ vectors[4] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[4])
    assert places[4].tolist() == [i for i in np.argsort(-exact) if i != 4][:4]
    assert find_neighbours(untrained, images[:3], rows=9, count=9)[0].shape == (3, 2), "as many as there are"


def test_images_are_read_upright_and_from_their_middle(tmp_path: Path) -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # the central square is grey all over
    image[:20, 30:70] = 100
    Image.fromarray(image).save(tmp_path / "lying.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(image[::-1, ::-1]).save(tmp_path / "turned.png", exif=turned)
    found = read_images([tmp_path / "lying.png", tmp_path / "turned.png"], 40)
    assert torch.equal(found[0], torch.from_numpy(image[:, 30:70]).permute(2, 0, 1)) and torch.equal(found[0], found[1])
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in find_files([tmp_path])] == ["lying.png", "turned.png"]


def test_grey_in_16_bits_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    (found,) = read_images([tmp_path / "grey.png"], 8)
    assert torch.equal(found, torch.from_numpy((grey / 257).round().astype(np.uint8)).expand(3, -1, -1))


def test_the_command_draws_a_run_and_its_export_alike(
    stage_run: Callable[[str, str], Path], photographs: Path, tmp_path: Path
) -> None:
    run = stage_run("zero1", "fp32")
    export = converted(run, tmp_path / "export", "--with-decoder")
    for source in (run, export):
        done = typed("launch/visualize.py", source, *files_of(photographs, 7), tmp_path / f"{source.name}.png")
        assert done.returncode == 0 and "4 pairs of 7 images, the last one mixed with the first" in done.stdout, (
            done.stderr
        )
    drawn, again = (Image.open(tmp_path / f"{source.name}.png") for source in (run, export))
    assert drawn.size == again.size and drawn.tobytes() == again.tobytes()
    assert drawn.width == 6 * (SIDE + GAP) - GAP + 2 * (SIDE // 8) and drawn.height > (4 + 7) * (SIDE + GAP)
    old = load_file(export / "decoder.safetensors")
    for options in ({"encoder": "mixmim_tiny", "img_size": 64}, {"enkoder": "mixmim_tiny"}):  # the former: a larger one
        save_file(old, export / "decoder.safetensors", {"model": json.dumps(options)})
        with pytest.raises(ValueError, match="holds files that are not of one model .[A-Za-z]*.; give the run, or"):
            load_pretrained(export)
    save_file(old, export / "decoder.safetensors")
    with pytest.raises(ValueError, match="does not say what model it is of"):
        load_pretrained(export)


def test_files_that_training_would_not_take_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("b.JPG", "deep/a.png", "._b.jpg", ".cache/c.png", "text.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert find_files([tmp_path]) == [tmp_path / "b.JPG", tmp_path / "deep/a.png"]


MISTAKES = {
    "RUN one.png OUT": "IMAGES: 1 are given; give 2 to 1,000",
    "RUN one.png gone.png OUT": "gone.png does not exist",
    "RUN one.png text.png OUT": "text.png is no readable image",
    "RUN one.png one.png": "one.png must be a file that does not exist yet and ends in .png",
    "RUN one.png one.png OUT.jpg": "out.png.jpg must be a file that does not exist yet and ends in .png",
    "RUN one.png one.png OUT --rows 0": "--rows 0 must be positive",
    "RUN one.png one.png OUT --seed=-1": "--seed -1 must be a whole number from 0",
    "EXPORT one.png one.png OUT": "holds no decoder, which reconstructions take; give the run, or export it by",
    "nowhere one.png one.png OUT": "nowhere is no folder",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    places = {"RUN": stage_run("zero1", "fp32"), "EXPORT": tmp_path / "export", "one.png": tmp_path / "one.png"}
    words = [str(places.get(word, word)).replace("OUT", str(tmp_path / "out.png")) for word in mistake.split()]
    words = [str(tmp_path / word) if word in ("text.png", "gone.png") else word for word in words]
    before = (tmp_path / "one.png").read_bytes()
    done = typed("launch/visualize.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ") and MISTAKES[mistake] in said
    assert (tmp_path / "one.png").read_bytes() == before and not list(tmp_path.glob("out*"))
