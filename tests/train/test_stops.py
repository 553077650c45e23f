"""Runs that are asked to stop, killed, or left hanging by one rank: what they promised to keep is there afterwards."""

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ROOT, command, environment, numbers, ranks_of, read_until, rows, start, tasks

from mixmim_ds.checkpoints import newest_complete

pytestmark = pytest.mark.slow


def test_signals_to_one_rank_stop_all_with_everything_saved(small_run: list[str], twenty: Path, tmp_path: Path) -> None:
    """One signal after the other, until the process is gone: in the agreement, the save and the last moments too."""
    stopped = tmp_path / "stopped"
    process = start(*small_run, f"run_dir={stopped}", "train.max_steps=20")
    read_until(process, "step 3/20")
    rank = ranks_of(process)[1]
    signals = itertools.cycle([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
    with suppress(ProcessLookupError, FileNotFoundError):
        while Path(f"/proc/{rank}/cmdline").read_bytes():  # empty once it has ended
            os.kill(rank, next(signals))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 85, printed
    steps = len(rows(stopped))
    assert 3 <= steps < 20 and f"stopped after step {steps}" in printed
    assert (stopped / "checkpoints" / "latest").read_text() == f"step_{steps:08d}"
    tasks(*small_run, f"run_dir={stopped}", "train.max_steps=20")
    assert numbers(stopped) == numbers(twenty)


def test_a_signal_while_images_are_looked_for_ends_the_start(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie on a server that takes questions and gives no answer."""
    from buckets import log_in  # here, for moto takes a second that the others need not wait

    with socket.create_server(("127.0.0.1", 0)) as server:
        log_in(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        words = command("python", *small_run, "data.root=s3://bucket/images", f"run_dir={tmp_path / 'run'}")
        process = subprocess.Popen(words, cwd=ROOT, env=environment())
        server.settimeout(120)
        asked, _ = server.accept()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM and not (tmp_path / "run").exists()
        asked.close()


def test_the_end_of_the_command_stops_what_it_started(small_run: list[str], tmp_path: Path) -> None:
    """As `kill`, `timeout` and systemd end it: DeepSpeed's own launcher lives on, and tells its ranks nothing."""
    process = start(*small_run, f"run_dir={tmp_path}", "train.max_steps=1000")
    read_until(process, "step 2/1,000")
    process.terminate()
    printed, _ = process.communicate(timeout=120)  # until the ranks have closed it
    steps = len(rows(tmp_path))
    assert f"stopped after step {steps}" in printed
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{steps:08d}"


def kill(process: subprocess.Popen[str], whom: str, dice: random.Random) -> None:
    """Kills without warning one rank, the launcher with the ranks left behind, or all; waits until all are gone."""
    ranks = ranks_of(process)
    if whom == "one rank" and ranks:
        os.kill(dice.choice(sorted(ranks.values())), signal.SIGKILL)
    elif whom == "launcher" and ranks:
        parent = int(Path(f"/proc/{ranks[min(ranks)]}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in {process.pid, parent}:
            os.kill(pid, signal.SIGKILL)
    else:
        with suppress(ProcessLookupError):  # it was done by then
            os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 60
    while ranks := ranks_of(process):
        assert time.monotonic() < end, f"these ranks live on: {ranks}"


def test_killed_at_random_moments_a_run_loses_no_checkpoint(small_run: list[str], twenty: Path, tmp_path: Path) -> None:
    """Saving after every step, killed in the middle of steps and saves, in two of three ways; exhaustively below."""
    killed = tmp_path / "killed"
    dice = random.Random(seed := time.time_ns())
    print("random.Random seed", seed)
    reached = 0
    for whom in dice.sample(["one rank", "launcher", "all"], 2):
        process = start(*small_run, f"run_dir={killed}", "train.max_steps=20", "train.save_every=1")
        read_until(process, f"step {reached + 2}/20")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=dice.uniform(0, 0.4))
        kill(process, whom, dice)
        newest = newest_complete(killed)
        assert newest is not None and newest.step >= reached + 1, "what was saved is still there"
        reached = newest.step
    tasks(*small_run, f"run_dir={killed}", "train.max_steps=20", "train.save_every=1")
    assert numbers(killed) == numbers(twenty)
    assert not list((killed / "checkpoints").glob("*.tmp"))


@pytest.mark.exhaustive
def test_fifty_kills_at_random_moments(small_run: list[str], twenty: Path, tmp_path: Path) -> None:
    """At any moment from the start of the launcher on; each start goes on from what the one before had saved.

    A launcher killed before it has started all ranks leaves one that waits for the others until the start's timeout.
    """
    dice = random.Random(seed := time.time_ns())
    folder, finished, failed = tmp_path / "0", 0, 0
    options = [*small_run, "train.max_steps=20", "train.save_every=1", "train.start_timeout_s=60"]
    for trial in range(50):
        process = start(*options, f"run_dir={folder}")
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=dice.uniform(0, 20))
        whom = dice.choice(["one rank", "launcher", "all"])
        if process.returncode is None:
            kill(process, whom, dice)
        if process.returncode == 0:
            finished += 1
            failed += numbers(folder) != numbers(twenty)
            folder = tmp_path / str(trial + 1)
    tasks(*options, f"run_dir={folder}")
    failed += numbers(folder) != numbers(twenty)
    print(f"50 trials (random.Random seed {seed}): {finished + 1} runs came to their end, {failed} with other metrics")
    assert not failed


def test_a_run_keeps_others_out_and_ends_if_one_of_its_ranks_hangs(
    small_run: list[str], twenty: Path, tmp_path: Path
) -> None:
    """One that has gone on from another start."""
    shutil.copytree(twenty, tmp_path / "run")
    options = [*small_run, f"run_dir={tmp_path / 'run'}", "train.max_steps=1000"]
    process = start(*options, "train.step_timeout_s=4")
    read_until(process, "step 22/1,000")
    refused = tasks(*options, processes=1, code=2)
    assert f"error: run_dir={tmp_path / 'run'} is in use by process " in refused.splitlines()[-1]
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    began = time.monotonic()
    read_until(process, "error: rank 0 waited in vain for another one")
    assert time.monotonic() - began < 4 + 10, "the timeout, and what a busy machine takes"
    kill(process, "all", random.Random(0))


def test_a_rank_that_dies_ends_the_others_with_the_reason(small_run: list[str], tmp_path: Path) -> None:
    process = start(*small_run, f"run_dir={tmp_path / 'run'}", "train.max_steps=1000")
    read_until(process, "step 2/1,000")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 85)
    assert printed.count("error: rank 0 waited in vain for another one") == 1 and "Traceback" not in printed, printed
