"""How the project's commands start one another, and how they end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mixmim_ds.device import on_gpu

BIN = Path(sys.executable).parent


def launched(script: str, *words: object, processes: int) -> tuple[str, ...]:
    """The command line that starts a script of launch/ on so many processes of this machine."""
    return (str(BIN / "deepspeed"), "--num_gpus", str(processes), f"launch/{script}.py", *map(str, words))


def environment() -> dict[str, str]:
    """This process's, with what the launcher looks for: its own tools on PATH, as in an activated environment."""
    # Said outright, DeepSpeed does not warn of finding no GPU.
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | ({} if on_gpu() else {"DS_ACCELERATOR": "cpu"})


def typed_path(word: str) -> Path:
    """A path as a user types it: ~ at its beginning is the home folder, which shells do not write out in quotes."""
    return Path(os.path.expanduser(word))


def exit_code(work: Callable[[], int]) -> int:
    """What a command's work returns, or 2 after one line that tells a user's mistake (ValueError)."""
    try:
        return work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells say it of SIGINT
