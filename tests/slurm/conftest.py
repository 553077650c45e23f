"""The cluster that the tests of this folder share, and an undisturbed job on it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing
from slurm.jobs import submit

STEPS = 40


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2, that are up and idle."""
    if missing():
        pytest.skip(f"would run jobs on a SLURM cluster of two nodes; {missing()}")
    # in /tmp itself, for munge's user may not look into pytest's folders
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mixmim-slurm-", dir="/tmp")), number=os.getpid() % 250 + 1)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder)


@pytest.fixture(scope="session")
def job_options(small_run: list[str]) -> list[str]:
    """The options of a run that takes some seconds and saves often."""
    return [*small_run, "activation_checkpointing=none", "train.save_every=5", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="session")
def straight(cluster: Cluster, job_options: list[str], shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of a job on two nodes that nothing disturbed: job.log and run/."""

    def make(folder: Path) -> None:
        folder.mkdir()
        job = submit(cluster, folder, *job_options)
        assert job.end() == "COMPLETED", job.log()

    return shared("straight", make)
