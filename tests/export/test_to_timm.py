"""Runs become timm models: from every ZeRO stage, with and without this package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from launching import ROOT, converted, typed
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mixmim_ds.evaluate.features import load_encoder
from mixmim_ds.export.pretrained import load_pretrained
from mixmim_ds.models import MixMIM

pytestmark = pytest.mark.slow
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_features_are_those_of_the_live_encoder(ds: str, stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = stage_run(ds, "fp32")
    encoder = timm.create_model(f"local-dir:{converted(folder, tmp_path / 'timm')}", pretrained=True).eval()
    live = MixMIM("mixmim_tiny", 64, decoder_dim=256, decoder_depth=2, decoder_num_heads=8).eval()
    _, working = torch.load(folder / "live.pt")
    live.load_state_dict(working | {name: buffer for name, buffer in live.named_buffers()}, strict=False)
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), live.encoder(IMAGES))


@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_bf16_run_gives_its_fp32_masters(ds: str, stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = stage_run(ds, "bf16")
    out = converted(folder, tmp_path / "timm", "--with-decoder")
    masters, working = torch.load(folder / "live.pt")
    written = load_file(out / "decoder.safetensors")
    written |= {f"encoder.{name}": tensor for name, tensor in load_file(out / "model.safetensors").items()}
    assert written.keys() - masters.keys() == {"encoder.absolute_pos_embed", "decoder_pos_embed"}
    for name, tensor in masters.items():
        assert torch.equal(written[name], tensor.view_as(written[name])), name
    assert any(not torch.equal(written[name], tensor.float()) for name, tensor in working.items()), "bf16 is coarser"


def test_encoder_and_decoder_make_the_whole_model(trained: Path, tmp_path: Path) -> None:
    out = converted(trained, tmp_path / "timm", "--with-decoder")
    model = MixMIM("mixmim_tiny", 64, decoder_dim=256, decoder_depth=2, decoder_num_heads=8)
    model.encoder.load_state_dict(load_file(out / "model.safetensors"))
    left = model.load_state_dict(load_file(out / "decoder.safetensors"), strict=False)
    assert not left.unexpected_keys and all(name.startswith("encoder.") for name in left.missing_keys)
    _, working = torch.load(trained / "live.pt")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, working[name]), name


def test_timm_loads_it_by_folder_and_by_file(trained: Path, tmp_path: Path) -> None:
    out = converted(trained, tmp_path / "timm")
    whole = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=10).eval()
    by_name = timm.create_model(
        "mixmim_tiny", img_size=64, num_classes=0, checkpoint_path=str(out / "model.safetensors")
    ).eval()
    with torch.no_grad():
        features = whole(IMAGES)
        assert classifier(IMAGES).shape == (2, 10)
        assert torch.equal(classifier.forward_head(classifier.forward_features(IMAGES), pre_logits=True), features)
        assert torch.equal(by_name(IMAGES), features)


def test_config_and_card_say_what_it_is(trained: Path, tmp_path: Path) -> None:
    out = converted(trained, tmp_path / "timm")
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_features"]) == ("mixmim_tiny", 256)
    about = config["pretrained_cfg"]
    assert about["input_size"] == [3, 64, 64] and about["interpolation"] == "bicubic"
    assert about["mean"] == [0.485, 0.456, 0.406] and about["std"] == [0.229, 0.224, 0.225]
    card = (out / "README.md").read_text()
    loss = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    fingerprint = OmegaConf.load(trained / "config.yaml").data.fingerprint
    for words in (f"{loss:.4f} at step 4", fingerprint, f"torch {torch.__version__.split('+')[0]}", "batch 32"):
        assert words in card
    assert "mixmim_ds is a Python package" in card and "timm >= 1.0.31" in card and "import timm, mixmim_ds\n" in card
    assert "\npipeline_tag: image-feature-extraction\n" in card and "\nlicense: unknown\n" in card


def test_the_normalisation_of_a_run_goes_along(own: Path, tmp_path: Path) -> None:
    config, told = OmegaConf.load(own / "config.yaml"), {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    config.data.mean, config.data.std = told.values()
    OmegaConf.save(config, own / "config.yaml")
    for source in (own, converted(own, tmp_path / "timm", "--with-decoder")):
        encoder, whole = load_encoder(str(source), 0, "source"), load_pretrained(source)
        assert {name: list(encoder.pretrained_cfg[name]) for name in told} == told
        assert {"mean": whole.mean, "std": whole.std} == told


def test_an_export_is_a_repository_of_the_hub(trained: Path, tmp_path: Path) -> None:
    """The Hub's own client finds it where it would have downloaded it to; nothing is fetched."""
    repository = tmp_path / "hub" / "models--me--mixmim"
    exported = converted(trained, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    code = "import sys, timm, torch, mixmim_ds; model = timm.create_model('hf-hub:me/mixmim', pretrained=True); "
    code += "torch.save(model.state_dict(), sys.argv[1])"
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "loaded.pt"], check=True, env=offline, cwd=ROOT)
    expected = load_file(exported / "model.safetensors")
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_card_tells_the_last_loss_there_is(trained: Path, tmp_path: Path) -> None:
    """Of a run whose last reported step was left out, and that was killed as it wrote a row."""
    folder = shutil.copytree(trained, tmp_path / "run")
    rows = folder / "metrics.jsonl"
    first = json.loads(rows.read_text().splitlines()[0])
    lines = [json.dumps(first), json.dumps(first | {"step": first["step"] + 1, "loss": None}), '{"step": 3, "lo']
    rows.write_text("\n".join(lines))
    card = (converted(folder, tmp_path / "timm") / "README.md").read_text()
    assert f"{first['loss']:.4f} at step {first['step']}" in card


def test_half_the_bytes_on_request(trained: Path, tmp_path: Path) -> None:
    files = [
        converted(trained, tmp_path / dtype, f"--dtype={dtype}") / "model.safetensors" for dtype in ("fp32", "bf16")
    ]
    full, half = map(load_file, files)
    assert files[1].stat().st_size < 0.51 * files[0].stat().st_size
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.bfloat16())


def test_the_architecture_file_needs_timm_alone(trained: Path, tmp_path: Path) -> None:
    """As the card and convert.py's last line say."""
    out = tmp_path / "base"
    done = typed("launch/convert.py", trained, out, "--architecture-file")
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    (tmp_path / "card.py").write_text(card.split("```python")[1].split("```")[0])
    (tmp_path / "line.py").write_text(done.stdout.splitlines()[-1].removeprefix("load it with: "))
    torch.save(IMAGES, tmp_path / "images.pt")
    script = (
        "import sys; sys.modules['mixmim_ds'] = sys.modules['deepspeed'] = None\n"
        "import torch\n"
        "for file in ('card.py', 'line.py'):\n"
        "    exec(open(file).read())\n"
        "    torch.save(model.eval()(torch.load('images.pt')).detach(), file + '.pt')\n"
        "try: mixmim._on_cuda()\n"
        "except ImportError as error: assert str(error).startswith('Masks on CUDA take mixmim_ds and triton (')\n"
        "else: raise AssertionError('it went on')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)
    encoder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        for file in ("card.py.pt", "line.py.pt"):
            assert torch.equal(torch.load(tmp_path / file), encoder(IMAGES))


def test_one_checkpoint_of_several_can_be_named(trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").glob("step_*")
    out = converted(checkpoint, tmp_path / "timm")
    assert (out / "model.safetensors").read_bytes() == (
        converted(trained, tmp_path / "again") / "model.safetensors"
    ).read_bytes()
