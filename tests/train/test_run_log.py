"""What a run tells, to its console and its train.log."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from mixmim_ds.train.run_log import log, open_log


def test_names_that_are_no_utf8_are_told_with_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, "utf-8", errors="strict"))
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    open_log(tmp_path, first=True)
    log.warning("%s is replaced", os.fsdecode(b"caf\xe9.jpg"))
    logging.shutdown([lambda handler=handler: handler for handler in log.handlers])
    for told in (console.getvalue(), (tmp_path / "train.log").read_bytes()):
        assert told.endswith(rb"caf\udce9.jpg is replaced" + b"\n")
