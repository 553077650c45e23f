"""The jobs of launch/ on a real cluster: they train across nodes, die, come back, and know when not to."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from launching import numbers, rows
from slurm.cluster import Cluster
from slurm.conftest import STEPS
from slurm.jobs import submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_job_trains_across_both_nodes(straight: Path) -> None:
    log, run = (straight / "job.log").read_text(), straight / "run"
    assert "8 img/process x 2 processes x 2 accumulation = 32 img/step" in log
    assert "healthcheck: 2 ranks on n1, n2; an all-reduce" in log and "finished" in log
    assert json.loads((run / "environment.json").read_text())[0]["hosts"] == ["n1", "n2"]
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in run.glob("logs/*/*")) == ["rank_0.log", "rank_1.log"]


def test_a_job_survives_whatever_happens_to_it(
    straight: Path, cluster: Cluster, job_options: list[str], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, *job_options)
    job.train(5)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.come_back(1)
    assert f"stopped on request, saved as {job.latest()}" in job.log()

    job.train(12)
    cluster.run("scontrol", "requeue", job.number)
    job.come_back(2)

    job.train(20)
    saved = job.latest()
    cluster.kill_node("n1")  # where the batch script and rank 0 run: SLURM itself has to queue the job again
    cluster.start_node("n1")
    job.come_back(3)
    assert job.latest() >= saved

    job.train(28)
    job.kill_tasks(signal.SIGSTOP)  # SLURM looks at time limits every half minute: let no step be done until then
    asked = job.log().count("asked to stop")
    job.update("TimeLimit=2")  # minutes; the script wants to know 5 before
    cluster.wait(lambda: job.log().count("asked to stop") > asked, "the early signal of the time limit", 60)
    job.kill_tasks(signal.SIGCONT)
    job.come_back(4)
    job.update("TimeLimit=60")

    assert job.end() == "COMPLETED", job.log()
    assert numbers(job.run_dir) == numbers(straight / "run")
    assert (job.run_dir / "starts.log").read_text().count("on n[1-2] from") == 5


def test_a_run_of_two_nodes_goes_on_with_one(
    straight: Path, cluster: Cluster, job_options: list[str], tmp_path: Path
) -> None:
    shutil.copytree(straight / "run", tmp_path / "run")
    job = submit(cluster, tmp_path, "--nodes=1", *job_options, f"train.max_steps={STEPS + 5}")
    assert job.end() == "COMPLETED", job.log()
    assert "x 1 processes x 4 accumulation = 32 img/step" in job.log() and f"step_{STEPS:08d}" in job.log()
    assert [row["step"] for row in rows(job.run_dir)] == list(range(1, STEPS + 6))


def test_a_job_fine_tunes_across_both_nodes_and_comes_back_after_a_stop(
    cluster: Cluster, labelled: Path, tmp_path: Path
) -> None:
    options = [
        "model=tiny", "model.img_size=64", "init=random", f"data.root={labelled}", "precision=fp32",
        f"data.index_dir={labelled.parent / 'index'}", "train.global_batch=32", "train.micro_batch=8",
        "train.log_every=1", "train.epochs=2",
    ]  # fmt: skip
    job = submit(cluster, tmp_path, *options, script="launch/finetune.slurm")
    job.train(3)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.end() == "COMPLETED" and job.show("Restarts") == ["1"], job.log()
    judged = [json.loads(line) for line in (job.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in judged] == [(7, 73), (14, 73)]
    assert (job.run_dir / "timm" / "model.safetensors").exists()


def test_an_array_is_several_runs_and_a_job_after_it_exports_one(
    cluster: Cluster, job_options: list[str], tmp_path: Path
) -> None:
    seed = "train.seed=${oc.env:SLURM_ARRAY_TASK_ID}"
    job = submit(cluster, tmp_path, "--array=0-1", "--nodes=1", *job_options, "train.max_steps=2", seed)
    convert = f"{sys.executable} launch/convert.py {job.run_dir}-1 {tmp_path}/exported"
    after = ["sbatch", f"--dependency=afterok:{job.number}", f"--output={tmp_path}/convert.log", "--wrap", convert]
    cluster.run(*after)
    cluster.wait(lambda: not cluster.run("squeue", "--noheader").strip(), "the end of all jobs", 200)
    first, second = (rows(Path(f"{job.run_dir}-{number}")) for number in (0, 1))
    assert len(first) == len(second) == 2 and first[0]["loss"] != second[0]["loss"]
    assert (tmp_path / "exported" / "model.safetensors").exists(), (tmp_path / "convert.log").read_text()


def test_a_bad_node_is_named_and_nothing_starts(cluster: Cluster, job_options: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster.kill_node("n2")
    cluster.start_node("n2", f"mount --bind {run_dir} {run_dir}", f"mount -o remount,bind,ro {run_dir}")
    cluster.wait(cluster.all_idle, "idle nodes")
    job = submit(cluster, tmp_path, *job_options)
    try:
        assert job.end() == "FAILED", job.log()
    finally:
        cluster.kill_node("n2")
        cluster.start_node("n2")
        cluster.wait(cluster.all_idle, "idle nodes")
    (error,) = (line for line in job.log().splitlines() if line.startswith("error: "))
    assert error.startswith("error: Node n2 is not fit: ") and "Read-only file system" in error
    assert "--exclude=n2" in error and not list(run_dir.glob("logs/*/*"))


MISTAKES = {
    "batch": (["train.global_batch=24"], {}, "error: train.global_batch=24 is no multiple of train.micro_batch=8 x 2"),
    "option": (["train.epoch=3"], {}, "error: train.epoch is no option; did you mean train.epochs?"),
    "script": ([], {"MIXMIM_ENV": "/nowhere/activate"}, "error: MIXMIM_ENV=/nowhere/activate is no file"),
    "environment": ([], {"MIXMIM_PREFIX": "env PYTHONHOME=/nowhere"}, "error: python lacks one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_loop(
    mistake: str, cluster: Cluster, job_options: list[str], tmp_path: Path
) -> None:
    overrides, names, sentence = MISTAKES[mistake]
    job = submit(cluster, tmp_path, *job_options, *overrides, **names)
    assert job.end() == "FAILED", job.log()
    (error,) = (line for line in job.log().splitlines() if line.startswith("error: "))
    assert error.startswith(sentence) and job.show("ExitCode", "Restarts") == ["2:0", "0"]


def test_a_wrong_partition_is_refused_at_once(cluster: Cluster) -> None:
    assert "invalid partition" in cluster.run("sbatch", "--partition=gpus", "launch/mixmim_h.slurm", code=1)


def test_a_run_that_always_fails_is_not_queued_for_ever(
    cluster: Cluster, job_options: list[str], tmp_path: Path
) -> None:
    """The healthcheck is fine, and what then is to train ends with exit code 1 each time."""
    prefix = tmp_path / "prefix"
    prefix.write_text('#!/bin/sh\n[ "$2" = launch/pretrain.py ] && exit 1\nexit 0\n')
    prefix.chmod(0o755)
    job = submit(cluster, tmp_path, *job_options, MIXMIM_PREFIX=str(prefix), MIXMIM_MAX_STARTS="2")
    assert job.end() == "FAILED", job.log()
    assert job.show("Restarts") == ["1"] and job.log().count("ended with code 1; the newest checkpoint is nothing") == 2
    assert "error: 2 starts of this job from nothing added no checkpoint" in job.log()
