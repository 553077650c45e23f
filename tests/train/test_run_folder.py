"""Whose a run folder is."""

import errno
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.train import run_folder
from mixmim_ds.train.run_folder import difference_to


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder as a version without dual_reconstruction left it; written down by hand, but for the options of today."""
    options = OmegaConf.to_container(OmegaConf.structured(PretrainConfig))
    del options["model"]["dual_reconstruction"]
    options["data"] |= {"root": "DIR", "fingerprint": "F"}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(options)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 20}\n')
    return tmp_path


def test_a_run_of_an_older_version_goes_on_while_new_options_keep_their_defaults(held: Path) -> None:
    options = [f"run_dir={held}", "data.root=ELSEWHERE"]
    assert difference_to(load_config(options), "F") is None
    changed = load_config([*options, "model.dual_reconstruction=false"])
    assert difference_to(changed, "F") == ("model.dual_reconstruction", True, False)
    assert difference_to(load_config(options), "G") == ("data.fingerprint", "F", "G")
    assert difference_to(load_config([*options, "train.seed=1"]), "F") == ("train.seed", 0, 1)


def test_a_run_that_ended_before_its_first_report_holds_no_folder(held: Path) -> None:
    """As one does whose micro-batch was too large for the GPU."""
    (held / "metrics.jsonl").unlink()
    assert difference_to(load_config([f"run_dir={held}", "data.root=DIR", "train.micro_batch=64"]), "F") is None
    (held / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert difference_to(load_config([f"run_dir={held}", "data.root=DIR", "train.micro_batch=64"]), "F") is not None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO])
def test_only_a_disk_that_knows_no_locks_is_taken_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    monkeypatch.setattr(run_folder.log, "propagate", True)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            run_folder._lock(tmp_path)
    else:
        run_folder._lock(tmp_path).close()
        assert "keep other runs out of it" in caplog.text
