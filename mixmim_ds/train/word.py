"""What ranks leave word of before they meet: a plain TCP store, which a dead or broken node cannot block."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from mixmim_ds.train.distributed import RankFailed, RunFailed
from mixmim_ds.train.slurm import PORTS, node, nodes


def open_store(rank: int, timeout_s: int) -> dist.Store:
    """Where ranks leave word; rank 0 keeps it, on a port of its own.

    Args:
        timeout_s: seconds that other ranks wait for what rank 0 has to do first, building the index too.

    Raises:
        RankFailed: rank 0 cannot be reached.
    """
    address, port = os.environ.get("MASTER_ADDR", "localhost"), port_beside(int(os.environ.get("MASTER_PORT", 0)))
    try:
        return dist.TCPStore(address, port, None, rank == 0, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankFailed(f"{node()} cannot reach node {nodes()[0]} at {address}:{port} ({reason}).") from error


def port_beside(rendezvous: int) -> int:
    """Another port than that of the run's rendezvous, found alike by all ranks; any (0) where there is none."""
    return rendezvous and (rendezvous + PORTS if rendezvous + PORTS < 1 << 16 else rendezvous - PORTS)


def first_does(store: dist.Store, rank: int, size: int, name: str, work: Callable[[], None]) -> None:
    """Has rank 0 do something; what it raises ends the check, so rank 0, which keeps the store, waits till all know.

    Raises:
        ValueError, RunFailed: on every rank, as `work` has raised it; RunFailed for an OSError, as in `on_first_rank`.
    """
    if rank == 0:
        store.set(name, json.dumps(_outcome(work)))
    mistake, failure = json.loads(store.get(name))
    store.add(f"{name} heard", 1)
    deadline = time.monotonic() + 5
    while rank == 0 and (mistake or failure) and store.add(f"{name} heard", 0) < size and time.monotonic() < deadline:
        time.sleep(0.01)
    if mistake:
        raise ValueError(mistake)
    if failure:
        raise RunFailed(failure)


def _outcome(work: Callable[[], None]) -> tuple[str, str]:
    """The sentence of the mistake, or of the failure, that the work has ended with; both empty after good work."""
    try:
        work()
    except ValueError as error:
        return str(error), ""
    except (RunFailed, OSError) as error:
        return "", str(error)
    return "", ""
