"""What a run tells while it is at work: to the console of the first rank, and for good to train.log."""

import io
import logging
import sys
from pathlib import Path

from mixmim_ds.train.distributed import PeerLost, RankFailed, RunFailed

LINES = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
NAMES = "backslashreplace"  # for files whose names are no UTF-8
log = logging.getLogger("mixmim_ds")


class _LogFile(logging.FileHandler):
    """train.log; what a full disk does not take is written later, or was in the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        """A traceback for every line would bury what the console still shows."""


def open_log(run_dir: Path, first: bool) -> None:
    """The first rank tells everything, to the console and to run_dir/train.log; the others only why they fail."""
    log.setLevel(logging.INFO)
    log.propagate = False
    file = _LogFile(run_dir / "train.log", delay=not first, errors=NAMES)
    if first:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=NAMES)
        _add(logging.StreamHandler(sys.stdout))
    else:
        file.setLevel(logging.CRITICAL + 1)  # which no record has: warnings of all ranks would be said many times
    _add(file)


def _add(handler: logging.Handler) -> None:
    handler.setFormatter(LINES)
    log.addHandler(handler)


def log_failure(error: Exception, rank: int) -> None:
    """Writes why a run ends to its train.log, if that is open, and not to the console, where it is told last. The first
    rank does so, and any other that fails by itself."""
    told = isinstance(error, (ValueError, RunFailed))
    if rank and (isinstance(error, PeerLost) or told and not isinstance(error, RankFailed)):
        return
    whose, traceback = f" of rank {rank}" if rank else "", None if told else (type(error), error, error.__traceback__)
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "error%s: %s", (whose, error), traceback)
    for handler in log.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)
