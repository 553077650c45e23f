"""Pixels of the DALI pipeline against torchvision and PIL, on real photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from mixmim_ds.data.dali import Feed, build_pipeline, run_pipeline
from mixmim_ds.data.plan import windows_at

CPU = torch.device("cpu")


def feed_of(paths: list[Path], windows: np.ndarray, flips: np.ndarray) -> Feed:
    """What the pipeline is fed for one batch."""
    rows = [np.frombuffer(str(path).encode(), np.uint8) for path in paths]
    table = np.zeros((len(rows), max(map(len, rows)) + 1), np.uint8)
    for row, name in zip(table, rows, strict=True):
        row[: len(name)] = name
    return lambda iteration: (table, windows[:, :2].copy(), windows[:, 2:].copy(), flips.astype(np.int32))


def decode(
    paths: list[Path], windows: np.ndarray, flips: np.ndarray, img_size: int = 128, device: torch.device = CPU
) -> torch.Tensor:
    feed = feed_of(paths, windows, flips)
    pipeline = build_pipeline(feed, "paths", len(paths), img_size, device, threads=2, prefetch=2)
    return run_pipeline(pipeline, device).clone().cpu()


def expected(path: Path, window: np.ndarray, flip: bool, img_size: int = 128) -> torch.Tensor:
    """The same crop by torchvision, which is what the authors use."""
    image = F.pil_to_tensor(Image.open(path).convert("RGB"))
    top, left, height, width = window.tolist()
    image = F.resized_crop(
        image, top, left, height, width, [img_size, img_size], InterpolationMode.BICUBIC, antialias=True
    )
    return F.horizontal_flip(image) if flip else image


def some_crops(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([Image.open(path).size[::-1] for path in paths], np.int32)
    windows = windows_at(0, 0, np.arange(len(paths)), sizes, (0.2, 1.0), (3 / 4, 4 / 3))
    return windows, np.arange(len(paths)) % 2 == 1


def files(folder: Path, suffix: str, count: int) -> list[Path]:
    found = sorted(folder.rglob(f"*{suffix}"))
    return found[:: max(1, len(found) // count)][:count]


@pytest.mark.parametrize(("suffix", "count"), [(".jpg", 60), (".png", 4), (".webp", 4)])
def test_crops_and_flips_equal_torchvisions(photographs: Path, suffix: str, count: int) -> None:
    paths = files(photographs, suffix, count)
    windows, flips = some_crops(paths)
    pixels = decode(paths, windows, flips)
    assert pixels.dtype == torch.uint8 and pixels.shape == (len(paths), 3, 128, 128)
    for i, path in enumerate(paths):
        difference = (pixels[i].int() - expected(path, windows[i], flips[i]).int()).abs().float()
        assert difference.mean() < 1, path  # the two round the cubic weights differently
        assert difference.quantile(0.999) <= 4, path


def test_decoding_alone_is_pils_to_the_bit(photographs: Path, tmp_path: Path) -> None:
    """A window of the output's size needs no resize, so what is left is the decoder."""
    bitmap = tmp_path / "photo.bmp"
    Image.open(files(photographs, ".jpg", 1)[0]).convert("RGB").save(bitmap)
    paths = [*files(photographs, ".jpg", 20), *files(photographs, ".png", 2), bitmap]
    windows = np.tile(np.array([3, 5, 64, 64], np.int32), (len(paths), 1))
    pixels = decode(paths, windows, np.zeros(len(paths), bool), img_size=64)
    for i, path in enumerate(paths):
        crop = np.asarray(Image.open(path).convert("RGB").crop((5, 3, 69, 67)))
        assert np.array_equal(pixels[i].permute(1, 2, 0).numpy(), crop), path


def test_a_window_beyond_the_image_is_moved_inside(photographs: Path) -> None:
    """An index may be older than a file; a window beyond the image must not reach the decoder."""
    path = files(photographs, ".jpg", 1)[0]
    width, height = Image.open(path).size
    windows = np.array([[height - 20, width - 20, 60, 60], [0, 0, 9999, 9999]], np.int32)
    pixels = decode([path, path], windows, np.zeros(2, bool))
    for window, got in zip([[height - 60, width - 60, 60, 60], [0, 0, height, width]], pixels, strict=True):
        difference = (got.int() - expected(path, np.array(window), False).int()).abs().float()
        assert difference.mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: would compare `mixed` decoding with torchvision's")
def test_the_gpu_decodes_the_same(photographs: Path) -> None:
    paths = files(photographs, ".jpg", 60)
    windows, flips = some_crops(paths)
    pixels = decode(paths, windows, flips, device=torch.device("cuda", 0))
    for i, path in enumerate(paths):
        difference = (pixels[i].int() - expected(path, windows[i], flips[i]).int()).abs().float()
        # The hardware decoder upsamples chroma by its own rule: a few levels at the edges of colours.
        assert difference.mean() < 3, path
