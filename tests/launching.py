"""Starts runs as a user types them, and reads what they leave behind."""

import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Shared = Callable[[str, Callable[[Path], object]], Path]  # see the fixture `shared`
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "mixmim_ds.train.pretrain", "mixmim_ds.train.finetune", "mixmim_ds.plan_run",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with PyTorch's compiler: a second of every run with ZeRO
])  # fmt: skip


def free_port() -> int:
    """One below those that Linux gives to outgoing connections, of which one could take it before the test does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def command(launcher: str, *overrides: str, processes: int = 2, script: str = "launch/pretrain.py") -> list[str]:
    """The command line of a script under `deepspeed`, `torchrun` or plain `python`."""
    port = str(free_port())
    start = {
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), f"--nproc-per-node={processes}", f"--master-port={port}"],
        "python": [sys.executable],
    }[launcher]
    return [*start, script, *overrides]


def environment() -> dict[str, str]:
    """The launcher finds `python` and its own tools on PATH, as in an activated environment."""
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def run(launcher: str, *overrides: str, processes: int = 2, code: int = 0, script: str = "launch/pretrain.py") -> str:
    """Runs to the end, expects the exit code, and returns all that was printed."""
    done = subprocess.run(
        command(launcher, *overrides, processes=processes, script=script),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def start(*overrides: str) -> subprocess.Popen[str]:
    """Starts a run of two processes by `deepspeed`, in a session of its own."""
    return subprocess.Popen(
        command("deepspeed", *overrides), cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Waits for a line with the words, five minutes at most; returns all lines so far."""
    lines = ""
    watchdog = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        for line in process.stdout:
            lines += line
            if words in line:
                return lines
    finally:
        watchdog.cancel()
    raise AssertionError(f"{words!r} never came: {lines}")


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The processes of the ranks that live: those in the launcher's session with the argument that it gave them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
            session = os.getsid(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
        rank = re.search(rb"\0--local_rank=(\d+)\0", arguments)
        if session == process.pid and rank:
            found[int(rank[1])] = int(folder.name)
    return found


def tasks(*overrides: str, processes: int = 2, code: int = 0, script: str = "launch/pretrain.py") -> str:
    """Runs the ranks of a job without a launcher; as srun starts them, each finds in its environment who it is.

    Launchers and imports take most of a short run's time, and here there are none. Expects the exit code of all and
    returns what all printed.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.NamedTemporaryFile("r") as printed:
        started = []
        for rank in range(processes):
            who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            names = place | {name: str(value) for name, value in who.items()}
            started.append(_fork([script, *overrides], names, printed.name, printed.name))
        codes = {_exit_code(process, 300) for process in started}
        text = printed.read()
    assert codes == {code}, f"exit codes {codes}: {text}"
    return text


def typed(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end in a process of its own, without its imports."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = _fork(list(map(str, words)), {}, *map(str, files))
        code = _exit_code(process, 120)
        texts = [file.read_text(errors="surrogateescape") for file in files]
    return subprocess.CompletedProcess(words, code, *texts)


def _fork(words: list[str], names: dict[str, str], stdout: str, stderr: str) -> BaseProcess:
    """Starts a script in a process forked from one that has done the imports.

    Not from several threads: `start` reaps the children of all and takes exit codes from those who wait for them.
    """
    process = FORKS.Process(target=_become, args=(words, environment() | names, stdout, stderr))
    process.start()
    return process


def _become(words: list[str], names: dict[str, str], stdout: str, stderr: str) -> None:
    """Turns this process into that of a command line."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ |= names
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _exit_code(process: BaseProcess, timeout_s: int) -> int | None:
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple[int, float, float, float]]:
    """What a run computed, without what it took: step, loss, lr and gradient norm."""
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(run_dir)]


def convert(*arguments: object) -> tuple[int, str]:
    """Runs launch/convert.py; exit code and messages."""
    done = typed("launch/convert.py", *arguments)
    return done.returncode, done.stderr


def converted(*arguments: object) -> Path:
    """Runs launch/convert.py to a good end; returns what it wrote, named last of the plain arguments."""
    code, messages = convert(*arguments)
    assert code == 0, messages
    return Path([str(word) for word in arguments if not str(word).startswith("--")][-1])


def refusal(*arguments: object) -> str:
    """Runs launch/convert.py into a mistake; returns the sentence that tells it."""
    code, messages = convert(*arguments)
    assert code == 2, messages
    return messages.splitlines()[-1]
