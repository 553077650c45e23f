"""TensorBoard's files: curves, pictures, the run's options as text, and the run as a row of the HPARAMS table."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mixmim_ds.config import flatten
from mixmim_ds.evaluate.pictures import Picture

TRIAL = 1 << 20  # bytes, of a picture and many rows
log = logging.getLogger("mixmim_ds")


class Board:
    """Writes TensorBoard's files; one that cannot be written is given up and another begun, for its writer stays
    broken. That waits until the disk takes something again: each that fails leaves an empty file and a traceback.

    Args:
        folder: of the event files.
        start: steps done so far; events of later steps are a killed run's and are dropped.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder, self.start = folder, start
        self.next = start + 1  # events from this step on are not this run's, when a file is begun
        self.writer: SummaryWriter | None = None
        self.failed, self.trial = False, folder / ".trial"

    def options(self, options: dict[str, Any]) -> None:
        """Begins with the run's options, nested: as text, and as the HPARAMS table's row of this run.

        That table shows of a run the newest `loss` among its curves, so the row follows the run to its end.
        """
        text = "\n".join(f"    {line}" for line in OmegaConf.to_yaml(OmegaConf.create(options)).splitlines())
        self._tell(lambda writer: writer.add_text("config", text, self.start))
        experiment, begin, _ = hparams(_row(options), {"loss": 0.0})
        for summary in (experiment, begin):
            self._tell(partial(_add, summary=summary))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """A point for each curve."""
        for name, value in values.items():
            self._tell(partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step))
        self.next = step + 1

    def picture(self, step: int, picture: Picture) -> None:
        """A picture, and what is to be seen there."""
        self._tell(lambda writer: writer.add_image(picture.name, picture.pixels, step))
        self._tell(lambda writer: writer.add_text(f"{picture.name}/columns", picture.caption, step))

    def flush(self) -> None:
        """Writes out what is buffered."""
        self._tell(SummaryWriter.flush)

    def close(self, finished: bool) -> None:
        """Writes out what is buffered; `finished`: the run has come to its end and will not go on."""
        if finished:
            *_, end = hparams({}, {})
            self._tell(partial(_add, summary=end))
        self._tell(SummaryWriter.close)

    def _tell(self, tell: Callable[[SummaryWriter], Any]) -> None:
        """Has something written, or says, once, that it could not."""
        try:
            if self.failed:
                self._try_disk()
            self.writer = self.writer or SummaryWriter(str(self.folder), purge_step=self.next)
            tell(self.writer)
        except OSError as error:
            if not self.failed:
                log.warning("%s cannot be written (%s): TensorBoard will lack some steps", self.folder, error.strerror)
            self.writer, self.failed = None, True

    def _try_disk(self) -> None:
        """OSError if the disk still takes nothing."""
        self.folder.mkdir(exist_ok=True)
        try:
            self.trial.write_bytes(bytes(TRIAL))
        finally:
            self.trial.unlink(missing_ok=True)
        self.failed = False


def _add(writer: SummaryWriter, summary: Any) -> None:
    """Of `hparams`, into this run; SummaryWriter.add_hparams would begin another one in a folder below."""
    writer._get_file_writer().add_summary(summary)


def _row(options: dict[str, Any]) -> dict[str, str | float | bool]:
    """The options by dotted name, as values that the table takes: texts must be UTF-8, which paths need not be."""
    flat = {name: value for name, value in flatten(options).items() if value is not None}
    return {
        name: value if isinstance(value, bool | int | float) else str(value).encode(errors="backslashreplace").decode()
        for name, value in flat.items()
    }
