"""Whose a run folder is."""

import errno
import fcntl
import os
import re
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tars import picture, write_tar

from mixmim_ds.compose import load_config, load_finetune_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.finetune_config import FinetuneConfig
from mixmim_ds.train import run_folder
from mixmim_ds.train.distributed import RunFailed, connected
from mixmim_ds.train.run_folder import check_run_folder, difference_to, facts_of, open_run_folder


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
    assert difference_to(load_config(options), {"fingerprint": "F"}) is None
    changed = load_config([*options, "model.dual_reconstruction=false"])
    assert difference_to(changed, {"fingerprint": "F"}) == ("model.dual_reconstruction", True, False)
    assert difference_to(load_config(options), {"fingerprint": "G"}) == ("data.fingerprint", "F", "G")
    other_seed = load_config([*options, "train.seed=1"])
    assert difference_to(other_seed, {"fingerprint": "F"}) == ("train.seed", 0, 1)


@pytest.mark.parametrize(("word", "loads"), [("optim.base_lr=1", True), ("model.img_size=192", False)])
def test_starting_anew_is_recommended_where_the_weights_fit(word: str, loads: bool, held: Path) -> None:
    config = load_config([f"run_dir={held}", "data.root=DIR", word])
    with pytest.raises(ValueError, match=f"holds a run with {word.partition('=')[0]}=") as refused:
        check_run_folder(config, {"fingerprint": "F"})
    assert ("resume=weights" in str(refused.value)) == loads


def test_a_run_that_ended_before_its_first_report_holds_no_folder(held: Path) -> None:
    """As one does whose micro-batch was too large for the GPU."""
    (held / "metrics.jsonl").unlink()
    assert (
        difference_to(load_config([f"run_dir={held}", "data.root=DIR", "train.micro_batch=64"]), {"fingerprint": "F"})
        is None
    )
    (held / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert (
        difference_to(load_config([f"run_dir={held}", "data.root=DIR", "train.micro_batch=64"]), {"fingerprint": "F"})
        is not None
    )


def test_a_run_that_began_while_another_waited_for_the_lock_keeps_the_folder(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first row is there when the other one has the lock."""
    lock, row = run_folder._lock, (held / "metrics.jsonl").rename(held / "row")
    monkeypatch.setattr(run_folder, "_lock", lambda folder: row.rename(held / "metrics.jsonl") and lock(folder))
    before = (held / "config.yaml").read_text()
    config = load_config([f"run_dir={held}", "data.root=DIR", "train.seed=1"])
    with connected(60) as world, pytest.raises(ValueError, match="holds a run with train.seed=0, not 1"):
        open_run_folder(config, world, {"fingerprint": "F"})
    assert (held / "config.yaml").read_text() == before


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


def test_a_report_that_looks_at_a_folder_keeps_no_run_out(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        letting_go = threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN))
        letting_go.start()
        run_folder._lock(tmp_path).close()
        letting_go.join()
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text(), "it is the run's now"


def test_a_machine_without_git_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_folder._revision()
    monkeypatch.setenv("PATH", "")
    assert run_folder._revision() is None


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EACCES, ValueError, "(Permission denied); choose another run_dir."),
        (errno.ENOSPC, RunFailed, "(No space left on device); make room there, or choose another run_dir."),
    ],
)
def test_a_disk_without_room_is_no_mistake(
    number: int, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of SLURM is queued again after it, and not after a mistake."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder, "write_whole", refuse)
    config = load_config(["model=tiny", "data=synthetic", f"run_dir={tmp_path}"])
    with connected(60) as world, pytest.raises(kind, match=re.escape(f"run_dir={tmp_path} cannot be written {said}")):
        open_run_folder(config, world, facts_of(None))


def in_shards(root: Path, *labels: str) -> FinetuneConfig:
    """Four images, packed with these labels."""
    images = {f"{i}.jpg": picture(40 + i) for i in range(4)}
    write_tar(root / "0.tar", images | {f"{i}.cls": label.encode() for i, label in enumerate(labels)})
    data = ["data=shards", f"data.root={root}/*.tar", f"data.val={root}/*.tar", f"data.index_dir={root}/index"]
    return load_finetune_config(["model=tiny", f"run_dir={root}/run", "init=random", *data])


def test_shards_packed_anew_with_other_labels_are_other_data(tmp_path: Path) -> None:
    facts = {}
    for name, labels in {"held": "0110", "moved": "0110", "swapped": "1001", "renamed": "0220"}.items():
        facts[name] = facts_of(open_labelled(in_shards(tmp_path / name, *labels).data)[0])
    assert len({each["fingerprint"] for each in facts.values()}) == 1
    config = in_shards(tmp_path / "held", *"0110")
    (tmp_path / "held" / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    kept = tmp_path / "held" / "run" / "config.yaml"
    options = OmegaConf.to_container(OmegaConf.structured(config))
    options["data"] |= facts["held"]
    kept.write_text(OmegaConf.to_yaml(OmegaConf.create(options)))
    check_run_folder(config, facts["moved"])
    for name in ("swapped", "renamed"):
        with pytest.raises(
            ValueError, match=r"other labels than those of data\.root=.* have; give them the old ones to"
        ):
            check_run_folder(config, facts[name])
    del options["data"]["labels"]  # as runs were kept before labels were
    kept.write_text(OmegaConf.to_yaml(OmegaConf.create(options)))
    assert difference_to(config, facts["held"]) is None and difference_to(config, facts["swapped"]) is None
    assert difference_to(config, facts["renamed"]) == ("data.classes", ["0", "1"], ["0", "2"])
