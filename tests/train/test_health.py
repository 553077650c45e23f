"""What the healthcheck finds on nodes and says of them; on a cluster: tests/slurm."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import free_port, typed

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.models import build_model
from mixmim_ds.train import health, slurm, word
from mixmim_ds.train.distributed import RunFailed, World
from mixmim_ds.train.health import Finding, _judge, healthcheck, look

USUAL = ["NVIDIA H100 80GB HBM3", "images 62529d36", "run_dir writable"]


@pytest.fixture
def config(small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return load_config([*small_run, f"run_dir={tmp_path}"])


def marked(config: PretrainConfig) -> PretrainConfig:
    """As the first node leaves the run folder for the others to find."""
    Path(config.run_dir, "healthcheck").write_text(health._signature())
    return config


def test_a_good_node_has_no_faults(config: PretrainConfig) -> None:
    finding = look(marked(config))
    assert not finding.faults and len(finding.facts) == 3 and finding.node == "n1"


def test_a_run_folder_that_is_not_shared_is_a_fault(config: PretrainConfig) -> None:
    assert "is not the folder that" in look(config).faults[0]


@pytest.mark.parametrize(
    ("of", "word", "sentence"),
    [
        ("pretrain", "model.img_size=100", "img_size=100x100 must be a multiple of 32"),
        ("pretrain", "model.encoder=resnet50", "model.encoder=resnet50 is no MixMIM encoder"),
        ("finetune", "init=/nope", "init: /nope is no folder"),
    ],
)
def test_what_is_wrong_with_an_option_is_no_fault_of_a_node(
    of: str, word: str, sentence: str, small_run: list[str], tmp_path: Path
) -> None:
    done = typed("launch/healthcheck.py", f"--of={of}", *small_run, f"run_dir={tmp_path / 'run'}", word)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert sentence in error and done.returncode == 2 and not (tmp_path / "run").exists()


def test_what_starts_no_run_is_not_checked(tmp_path: Path) -> None:
    done = typed("launch/healthcheck.py", "--of=finetune", "eval_only=true", "init=random", f"data.root={tmp_path}")
    assert done.returncode == 2 and "eval_only=true starts no run" in done.stderr


def test_a_run_that_starts_anew_from_weights_is_checked_as_such(
    stage_run: Callable[[str, str], Path], small_run: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stage_run("zero1", "fp32"), tmp_path / "run"))
    words = ["launch/healthcheck.py", *small_run, "precision=fp32", f"run_dir={run}"]
    anew = "train.epochs=7"
    refused = typed(*words, anew)
    assert refused.returncode == 2 and "start anew from its weights with resume=weights" in refused.stderr
    assert typed(*words, anew, "resume=weights").returncode == 0


def test_a_gpu_that_is_sick_is_a_fault_of_its_node(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's error is imitated."""

    def sick(number: int) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(health, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", sick)
    assert look(marked(config)).faults == ["CUDA error: uncorrectable ECC error encountered"]


def test_a_data_set_that_is_missing_on_a_node_is_a_fault(config: PretrainConfig) -> None:
    config.data.root = "/not/mounted/here"
    (fault,) = look(marked(config)).faults
    assert "data.root=/not/mounted/here" in fault


def test_two_checkpoints_must_fit(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of masters and two moments, in fp32."""
    usage = namedtuple("usage", "total used free")
    two = 2 * 3 * 4 * sum(parameter.numel() for parameter in build_model(config.model).parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, two - 1))
    (fault,) = look(marked(config)).faults
    assert "GiB left, two checkpoints take" in fault
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, two))
    assert not look(marked(config)).faults


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [(errno.ENOSPC, RunFailed, "make room there, or"), (errno.EROFS, ValueError, "")],
    ids=["full", "read-only"],
)
def test_a_full_disk_may_pass_and_is_no_mistake(
    number: int, kind: type[Exception], advice: str, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(health, "_signature", fail)  # as it is written
    with pytest.raises(kind, match=rf"cannot be written \({os.strerror(number)}\); {advice} ?choose another run_dir"):
        healthcheck(config, wait_s=1)
    assert not Path(config.run_dir, "healthcheck").exists()


def test_gpus_that_slurm_gave_must_be_there(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "on_gpu", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert look(marked(config)).faults == ["PyTorch finds none of the 8 GPUs that SLURM gave (nvidia-smi tells more)"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not look(marked(config)).faults


def test_the_node_that_differs_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding(f"n{rank // 2}", list(USUAL)) for rank in range(8)]
    assert _judge(findings) == ""
    assert capsys.readouterr().out.splitlines()[0] == f"healthcheck n0: 2 ranks, {', '.join(USUAL)}"
    findings[5].facts[0] = "NVIDIA A100-SXM4-80GB"
    findings[6].faults += ["GPU 0 is in use"]
    findings[7].faults += ["GPU 0 is in use"]
    said = _judge(findings)
    assert said.endswith(". Mend that."), "without SLURM"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-3]")
    said = _judge(findings)
    assert "Node n2 is not fit: it has NVIDIA A100" in said and said.count("GPU 0 is in use") == 1
    assert said.endswith("sbatch --exclude=n2,n3.")


def test_a_node_whose_clock_is_astray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three nodes, whose answers are made up."""
    clocks = [(1000.0, "n1"), (1000.5, "n2"), (1000.5 + 3600, "n3")]
    monkeypatch.setattr(health, "gather", lambda world, mine: clocks)
    monkeypatch.setattr(health.dist, "barrier", lambda group: None)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    world = World(0, 3, torch.device("cpu"), None)
    with pytest.raises(RunFailed, match=r"n3 by \+3600 s\. Set them \(NTP\), .*--exclude=n3\.$"):
        health._compare_clocks(world)
    clocks.pop()
    health._compare_clocks(world)


def test_the_checks_port_is_one_that_exists() -> None:
    assert [word.port_beside(given) for given in (0, 29_500, 55_535, 60_000)] == [0, 39_500, 65_535, 50_000]


def test_nodes_that_cannot_meet_are_one_sentence(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    done = typed("launch/healthcheck.py", *small_run, f"run_dir={tmp_path / 'run'}")
    assert "error: the interconnect does not answer" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 1


def test_a_silent_node_is_named(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks on two nodes only the first answers."""
    config.train.global_batch = 32
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURM_STEP_NODELIST": "n[1-2]"}
    place |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() - slurm.PORTS)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunFailed, match="Node n2 is not fit: no answer within 1 s") as raised:
        healthcheck(config, wait_s=1)
    assert "--exclude" not in str(raised.value), "sbatch has not started these"


@pytest.mark.parametrize(
    ("step", "named"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2(x1),1"}, ["n1", "n2", "n2", "n3"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, ["of rank 0", "of rank 1", "of rank 2", "of rank 3"]),
        ({}, ["of rank 0", "of rank 1", "of rank 2", "of rank 3"]),
    ],
    ids=["srun", "torchrun below srun", "neither"],
)
def test_silent_ranks_lie_where_slurm_says_or_nobody_knows(
    step: dict[str, str], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    for name, value in ({"SLURM_STEP_NODELIST": "n[1-3]"} | step).items():
        monkeypatch.setenv(name, value)
    assert [finding.node for finding in health._collect(torch.distributed.HashStore(), 4, 1)] == named
