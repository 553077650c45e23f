"""What a run writes down of steps that went wrong, or never ended."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from mixmim_ds.checkpoints import write_whole
from mixmim_ds.config import RunConfig
from mixmim_ds.train.distributed import RunFailed, World, gather, on_first_rank

log = logging.getLogger("mixmim_ds")


def record_flights(config: RunConfig) -> None:
    """Lets every rank write its last collectives to failures/flight_recorder_RANK where one of them times out on GPUs.

    PyTorch reads these variables when the processes meet, and wants the folder by the time it writes:
    `open_run_folder` makes it.
    """
    dumps = Path(config.run_dir).absolute() / "failures" / "flight_recorder_"
    names = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_DUMP_TEMP_FILE": str(dumps)}
    for name, value in names.items():
        os.environ.setdefault(name, value)


class BadSteps:
    """Steps whose loss or gradient is not finite. DeepSpeed leaves out the update of such a step, on all ranks alike.

    Each is reported in failures/step_N.json. The first ends the run, unless `train.max_bad_steps` allows some. Under
    fp16 a step with finite losses is none of them: its loss scale was too high and has been lowered.

    Args:
        start: steps that earlier starts of the run have done; what they reported counts.
        name: of an image by its row in the index.
    """

    def __init__(self, config: RunConfig, world: World, start: int, name: Callable[[int], str]) -> None:
        self.config, self.world, self.name = config, world, name
        self.folder = Path(config.run_dir) / "failures"
        reported = on_first_rank(world, lambda: [path.stem for path in self.folder.glob("step_????????.json")])
        self.count = sum(int(stem.removeprefix("step_")) <= start for stem in reported)

    def note(self, step: int, lr: float, losses: list[Tensor], ids: list[np.ndarray], newest: int) -> None:
        """Reports a step.

        Args:
            losses: this rank's, scalars on the device, one a micro-batch.
            ids: int64 [B], the images of each.
            newest: the step of the newest complete checkpoint.

        Raises:
            RunFailed: more such steps than are allowed.
        """
        own = [loss.item() for loss in losses]
        images = [[self.name(int(i)) for i in batch] for batch in ids]
        ranks = [
            {"rank": rank, "losses": found, "images": names}
            for rank, (found, names) in enumerate(gather(self.world, (own, images)))
        ]
        bad = [rank["rank"] for rank in ranks if not all(map(math.isfinite, rank["losses"]))]
        if self.config.precision == "fp16" and not bad:
            return
        self.count += 1
        path = self.folder / f"step_{step:08d}.json"
        where = f"the loss of rank {', '.join(map(str, bad))}" if bad else "the gradient"
        said = f"{where} is not finite at step {step}, which was left out; see {path}"
        if self.world.first:
            head = {"step": step, "lr": lr, "precision": self.config.precision, "newest_checkpoint": newest}
            self._write(path, head | {"ranks_not_finite": bad, "ranks": ranks})
        allowed = self.config.train.max_bad_steps
        if self.count > allowed:
            raise RunFailed(
                f"{said}; the newest checkpoint is that of step {newest}, train.max_bad_steps={allowed} allows no more."
            )
        log.warning("%s; train.max_bad_steps=%s allows %s more", said, allowed, allowed - self.count)

    def _write(self, path: Path, report: dict[str, object]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(report, indent=1))
        except OSError as error:
            log.warning("%s cannot be written (%s)", path, error.strerror)
