"""Exports that cannot be made are refused in one sentence; those that are killed leave no half."""

import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launching import ROOT, converted, refusal
from omegaconf import OmegaConf

from mixmim_ds.export.files import write_safetensors

pytestmark = pytest.mark.slow


def test_an_existing_destination_stays_as_it_was(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists already" in refusal(trained, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def damage_nothing_there(own: Path) -> None:
    shutil.rmtree(own)


def damage_no_checkpoint(own: Path) -> None:
    shutil.rmtree(own)
    own.mkdir()


def damage_no_marker(own: Path) -> None:
    for marker in own.glob("checkpoints/*/COMPLETE.json"):
        marker.unlink()


def damage_truncated(own: Path) -> None:
    file = next(own.glob("checkpoints/step_*/*optim_states.pt"))
    os.truncate(file, file.stat().st_size // 2)


def damage_zeros(own: Path) -> None:
    file = next(own.glob("checkpoints/step_*/*optim_states.pt"))
    file.write_bytes(bytes(file.stat().st_size))


def damage_other_size(own: Path) -> None:
    config = OmegaConf.load(own / "config.yaml")
    config.model.encoder = "mixmim_base"
    config.model.img_size = 224
    OmegaConf.save(config, own / "config.yaml")


def damage_no_config(own: Path) -> None:
    (own / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_nothing_there, "is no folder"),
        (damage_no_checkpoint, "is neither a run folder"),
        (damage_no_marker, "holds no complete checkpoint"),
        (damage_truncated, "holds no complete checkpoint"),
        (damage_zeros, "holds no complete checkpoint"),
        (damage_other_size, "holds another model than model.encoder=mixmim_base at 224 pixels"),
        (damage_no_config, "config.yaml cannot be read"),
    ],
)
def test_a_bad_source_is_one_sentence(damage: object, sentence: str, own: Path, tmp_path: Path) -> None:
    damage(own)
    assert sentence in refusal(own, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_run_from_before_an_option_was_there_is_exported(own: Path, tmp_path: Path) -> None:
    whole = converted(own, tmp_path / "whole", "--with-decoder")
    config = OmegaConf.load(own / "config.yaml")
    del config.model.group_attention, config.model.dual_reconstruction
    OmegaConf.save(config, own / "config.yaml")
    out = converted(own, tmp_path / "out", "--with-decoder")
    for name in ("model.safetensors", "decoder.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_named_checkpoint_with_altered_bytes_is_refused(own: Path, tmp_path: Path) -> None:
    damage_zeros(own)
    (checkpoint,) = (own / "checkpoints").glob("step_*")
    assert "optim_states.pt is not what was written" in refusal(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """On a file system of one MiB, in a mount namespace of the command's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} && {sys.executable} launch/convert.py {trained} {disk}/out; "
        f"code=$?; ls -A {disk} >&2; exit $code"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1], "and nothing is listed after it"


def test_what_reads_back_otherwise_is_an_error(tmp_path: Path) -> None:
    class Changing:
        shape, dtype = torch.Size([2]), torch.float32
        values = iter((torch.zeros(2), torch.ones(2)))

        def contiguous(self) -> torch.Tensor:
            return next(self.values)

    with pytest.raises(OSError, match="gives back another x than was written"):
        write_safetensors(tmp_path / "out", {"x": Changing()}, torch.float32)


def test_killed_while_it_writes_it_leaves_no_half(trained: Path, tmp_path: Path) -> None:
    """Killed four times, each at a random moment after the first file was begun."""
    dice = random.Random(2205)
    out = tmp_path / "out"
    whole = converted(trained, tmp_path / "whole", "--with-decoder")
    expected = {file.name: file.read_bytes() for file in whole.iterdir()} | {"README.md": None}
    command = [sys.executable, "launch/convert.py", str(trained), str(out), "--with-decoder"]
    for _ in range(4):
        for scratch in tmp_path.glob(".out.*"):
            shutil.rmtree(scratch)
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".out.*")):
            pass
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=dice.uniform(0, 0.1))
        process.kill()
        process.wait()
        if out.exists():
            found = {file.name: file.read_bytes() for file in out.iterdir()} | {"README.md": None}
            assert found == expected
            shutil.rmtree(out)


def test_what_lies_beside_an_export_stays(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "base.tmp").mkdir()
    converted(trained, tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.tmp"]
