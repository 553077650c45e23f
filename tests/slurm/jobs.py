"""Jobs of launch/mixmim_h.slurm on a test cluster."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from slurm.cluster import NODES, Cluster


@dataclass(frozen=True)
class Job:
    """A job that was submitted, its run folder and its log."""

    cluster: Cluster
    number: str
    run_dir: Path
    output: Path

    def show(self, *fields: str) -> list[str]:
        """Fields of `scontrol show job`, as they are at one moment."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return [shown.partition(f" {field}=")[2].split()[0] for field in fields]

    def update(self, setting: str) -> None:
        """`scontrol update`."""
        self.cluster.run("scontrol", "update", f"JobId={self.number}", setting)

    def hurry(self) -> str:
        """Takes away the two minutes that SLURM lets a job wait which is queued again; the state."""
        state, reason, begin = self.show("JobState", "Reason", "StartTime")
        put_off = (state, reason) == ("PENDING", "BeginTime") and begin != "Unknown"
        if put_off and datetime.fromisoformat(begin) - datetime.now() > timedelta(seconds=10):
            # not at once: SLURM takes a start in the very second of the stop for the old one, and ends it
            self.update("StartTime=now+3")
        return state

    def end(self) -> str:
        """Waits for the end, however often it is queued again; the last state."""

        waiting = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        self.cluster.wait(lambda: self.hurry() not in waiting, f"the end of {self.output}", 300)
        return self.show("JobState")[0]

    def train(self, steps: int) -> None:
        """Waits until the run has reported so many steps."""

        def done() -> bool:
            self.hurry()
            return self.steps() >= steps

        self.cluster.wait(done, f"step {steps} in {self.output}", 300)

    def come_back(self, times: int) -> None:
        """Waits until the job runs that has been queued again for so many times."""

        def back() -> bool:
            self.hurry()
            return self.show("Restarts", "JobState") == [str(times), "RUNNING"]

        self.cluster.wait(back, f"restart {times} of {self.output}", 120)

    def steps(self) -> int:
        """How many steps the run has reported."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def latest(self) -> str:
        """The newest checkpoint."""
        return (self.run_dir / "checkpoints" / "latest").read_text()

    def log(self) -> str:
        """What the job has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def kill_tasks(self, number: signal.Signals) -> None:
        """Sends a signal to the training processes on all nodes."""
        for node in NODES:
            for pid in self.cluster.processes(node):
                with suppress(OSError):
                    if b"launch/pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                        os.kill(pid, number)


def submit(cluster: Cluster, folder: Path, *words: str, script: str = "launch/mixmim_h.slurm", **names: str) -> Job:
    """Submits a job with a run folder below `folder`; options of sbatch begin with --, the rest are the run's.

    The scheduler's GPUs are none, so DeepSpeed's own variable says that CPUs are meant; real ones are hidden.
    Nothing is compiled, which would take longer than what is tested.
    """
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if not word.startswith("--")]
    names = {"DS_ACCELERATOR": "cpu", "MIXMIM_PREFIX": "env CUDA_VISIBLE_DEVICES="} | names
    output, run_dir = folder / "job.log", folder / "run"
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={output}", *options, script]
    environment = [f"{name}={value}" for name, value in names.items()]
    number = cluster.run("env", *environment, *sbatch, f"run_dir={run_dir}", "compile=false", *overrides)
    return Job(cluster, number.strip(), run_dir, output)
