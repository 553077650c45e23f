"""The shell scripts, without a cluster."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import ROOT

SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.s*h")),
    *sorted((ROOT / "launch").glob("*.slurm")),
    ROOT / "tests/slurm/install.sh",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(script: object) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("would look for mistakes in the shell scripts; shellcheck missing (make test installs it as root)")
    found = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# What a job does before it asks anything of the cluster, with the cluster's answers made up.
BEGINNING = """
source launch/common.sh
activate() { :; }; count_tasks() { tasks=1 cpus=1; }; set_environment() { :; }; note_start() { :; }
check_nodes() { printf '%s\\n' "$run_dir" "${@: -1}"; exit; }
run_job launch/pretrain.py "$@"
"""
JOB = {"SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "HOME": "/home/me"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a=b", "runs/job"),
        ("run_dir=/é=(1) [2]{3}", "/é=(1) [2]{3}"),
        ("++run_dir=/x", "/x"),
        ("run_dir=~/x", "/home/me/x"),
    ],
)
def test_a_job_and_its_run_agree_on_the_folder(written: str, meant: str) -> None:
    command = ["bash", "-c", BEGINNING, "job", written]
    found = subprocess.run(command, cwd=ROOT, env=os.environ | JOB, capture_output=True, text=True, check=True)
    folder, word = found.stdout.splitlines()[-2:]
    assert (folder, word) == (meant, f"run_dir={meant}")


def test_a_job_without_a_run_folder_is_one_sentence() -> None:
    """As where a variable of the shell that submits is not set."""
    command = ["bash", "-c", BEGINNING, "job", "run_dir="]
    found = subprocess.run(command, cwd=ROOT, env=os.environ | JOB, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "") and found.stderr.startswith("error: run_dir is not set; add")


# As a job does it, up to where it starts its tasks.
MEETING = """
source launch/common.sh
run_dir=$1 logs=$1/logs cpus=1
activate && set_environment && echo "${RANK:-none} ${MASTER_ADDR:-none} $MASTER_PORT"
"""


def test_the_meeting_point_is_that_of_the_environments_script_not_of_the_shell_that_submits(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("export MASTER_PORT=4444\n")
    shell = {"RANK": "7", "MASTER_ADDR": "laptop", "MASTER_PORT": "1"}
    names = os.environ | JOB | shell | {"MIXMIM_ENV": str(tmp_path / "env.sh"), "MIXMIM_SRUN": "--exclusive"}
    command = ["bash", "-c", MEETING, "job", tmp_path / "run"]
    found = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, check=True)
    assert found.stdout == "none none 4444\n"


def test_of_many_ranks_errors_the_cause_is_shown_first(tmp_path: Path) -> None:
    cause = "error: rank 5: KeyError: 'x'"
    for rank in range(1, 9):
        told = cause if rank == 5 else f"error: rank {rank} waited in vain for another one"
        (tmp_path / f"rank_{rank}.log").write_text(f"step 1\n{told}\n")
    training = "source launch/common.sh; start() { false & running=$!; }; logs=$1 prefix=(); train launch/pretrain.py"
    command = ["bash", "-c", training, "job", tmp_path]
    found = subprocess.run(command, cwd=ROOT, env=os.environ | JOB, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert len(lines) == 3 and lines[0] == cause and "rank 1 waited" in lines[1]
