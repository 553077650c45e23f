"""The shell scripts, without a cluster."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import ROOT

from mixmim_ds.compose import load_config, load_finetune_config
from mixmim_ds.train.engine import accumulation

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


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.slurm")), ids=lambda path: path.name)
def test_jobs_differ_in_name_nodes_and_recipe_alone(script: Path) -> None:
    """And take the nodes on which their recipe needs no accumulation."""
    text = script.read_text()
    name, nodes, *others = re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE)
    assert name == f"--job-name={script.stem}"
    assert others == [
        "--gpus-per-node=8", "--exclusive", "--time=24:00:00", "--signal=B:USR1@300", "--requeue", "--open-mode=append",
        "--output=slurm-%x-%j.log",
    ]  # fmt: skip
    recipe = [] if script.stem == "finetune" else [f"+experiment={script.stem}"]
    run = " ".join(["run_job", f"launch/{'pretrain' if recipe else 'finetune'}.py", *recipe, '"$@"'])
    assert text.splitlines()[-1] == run
    load = load_config if recipe else load_finetune_config
    config = load([*recipe, "data.root=DIR", "run_dir=DIR", *([] if recipe else ["init=DIR"])])
    assert accumulation(config, 8 * int(nodes.removeprefix("--nodes="))) == 1


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


# As a job does it when its tasks have ended, with SLURM's answer made up.
ENDING = """
source launch/common.sh
run_dir=$1 logs=$1/logs/1.0 code=$2
scontrol() { echo "$@" >>"$run_dir/asked"; echo "Requested operation is presently disabled"; return "$REFUSED"; }
end_job
"""


@pytest.mark.parametrize(
    ("code", "earlier", "ends_with", "asks", "says"),
    [
        (0, 1, 0, False, "finished"),
        (2, 1, 2, False, ""),
        (85, 1, 85, True, "stopped on request, saved as step_7"),
        (1, 2, 1, True, "ended with code 1; the newest checkpoint is step_7"),
        (1, 3, 1, False, "3 starts of this job from step_7 added no checkpoint"),
    ],
)
@pytest.mark.parametrize("refused", [False, True])
def test_a_job_is_queued_again_where_that_helps(
    code: int, earlier: int, ends_with: int, asks: bool, says: str, refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_7")
    starts = ["job 1 on n1 from nothing", "job 2 on n1 from step_7", *["job 1 on n1 from step_7"] * earlier]
    (tmp_path / "starts.log").write_text("".join(f"2026-01-01 10:00:00 {start}\n" for start in starts))
    command = ["bash", "-c", ENDING, "job", tmp_path, str(code)]
    names = os.environ | JOB | {"REFUSED": str(int(refused))}
    found = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True)
    assert found.returncode == ends_with and says in found.stdout + found.stderr
    assert (tmp_path / "asked").exists() == asks
    assert ("not queued again by itself (Requested operation" in found.stdout) == (asks and refused)


def test_tasks_that_start_after_the_signal_hear_of_it() -> None:
    starting = (
        "source launch/common.sh; srun() { exec sleep 60; }; stopping=yes tasks=1 per_node=1 cpus=1 srun_options=()"
    )
    command = ["bash", "-c", f"{starting}; start python; await; echo $code"]
    names = os.environ | JOB | {"SLURM_JOB_NUM_NODES": "1"}
    found = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, timeout=20)
    assert found.stdout == "138\n", found.stderr  # of SIGUSR1
