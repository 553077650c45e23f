"""Files that grow line by line, a JSON object each."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixmim_ds.checkpoints import append_whole, write_whole

Row = dict[str, Any]
log = logging.getLogger("mixmim_ds")


class JsonLines:
    """The file at `path`; what a full or read-only disk does not take is kept and written later."""

    def __init__(self, path: Path) -> None:
        self.path, self.unwritten = path, ""

    def load(self, wanted: Callable[[Row], bool]) -> list[Row]:
        """The rows there that are wanted; the others go, as does a last one that a killed run left unfinished."""
        if not self.path.exists():
            return []
        rows = [row for row in read_rows(self.path) if wanted(row)]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def add(self, *rows: Row) -> None:
        """Appends rows, or says that it cannot."""
        self.unwritten += "".join(json.dumps(row) + "\n" for row in rows)
        try:
            append_whole(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            log.warning("%s cannot be written (%s): its rows are kept and written later", self.path, error.strerror)


def read_rows(path: Path) -> list[Row]:
    """The objects of a file with one a line, but for what a killed run left unfinished; none if there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
