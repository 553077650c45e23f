"""Whose a run folder is."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.train.run_folder import difference_to


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder as a version without dual_reconstruction left it; written down by hand, but for the options of today."""
    options = OmegaConf.to_container(OmegaConf.structured(PretrainConfig))
    del options["model"]["dual_reconstruction"]
    options["data"] |= {"root": "DIR", "fingerprint": "F"}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(options)))
    return tmp_path


def test_a_run_of_an_older_version_goes_on_while_new_options_keep_their_defaults(held: Path) -> None:
    options = [f"run_dir={held}", "data.root=ELSEWHERE"]
    assert difference_to(load_config(options), "F") is None
    changed = load_config([*options, "model.dual_reconstruction=false"])
    assert difference_to(changed, "F") == ("model.dual_reconstruction", True, False)
    assert difference_to(load_config(options), "G") == ("data.fingerprint", "F", "G")
    assert difference_to(load_config([*options, "train.seed=1"]), "F") == ("train.seed", 0, 1)
