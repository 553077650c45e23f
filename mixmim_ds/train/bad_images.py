"""The broken images that a run has met, on whatever rank: agreed on, named in the run folder, counted."""

import json
import logging
from collections import ChainMap
from pathlib import Path

from mixmim_ds.checkpoints import append_whole, write_whole
from mixmim_ds.config import RunConfig
from mixmim_ds.data.shards import Images
from mixmim_ds.train.distributed import RunFailed, World, gather, on_first_rank

log = logging.getLogger("mixmim_ds")


class BadImages:
    """Adds to the loader's broken images those that other ranks, or earlier starts of the run, have met.

    failures/bad_images.jsonl holds one line each: id (row of the index), image (its name) and reason.
    """

    def __init__(self, config: RunConfig, world: World, index: Images | None, bad: dict[int, str]) -> None:
        """`bad` is the loader's."""
        self.world, self.index, self.bad = world, index, bad
        self.allowed = 0.0 if index is None else config.data.max_bad_share * len(index)
        self.option = f"data.max_bad_share={config.data.max_bad_share}"
        self.path = Path(config.run_dir) / "failures" / "bad_images.jsonl"
        known: dict[int, str] = on_first_rank(world, lambda: _read(self.path))
        bad |= known
        self.told = set(known)
        self.unwritten = ""

    def exchange(self) -> int:
        """All ranks tell each other what is new; the number of broken images of the run so far.

        Raises:
            RunFailed: more than data.max_bad_share of the data set.
        """
        own = {i: reason for i, reason in self.bad.items() if i not in self.told}
        new = dict(ChainMap(*gather(self.world, own)))
        self.bad |= new
        self.told |= set(new)
        if new and self.index is not None and self.world.first:
            self._write(new, self.index)
        if self.index is not None and len(self.told) > self.allowed:
            raise RunFailed(
                f"{len(self.told):,} of {len(self.index):,} images are broken, more than {self.option} allows, see "
                f"{self.path}: repair the data or raise data.max_bad_share, then start the same command again."
            )
        return len(self.told)

    def _write(self, new: dict[int, str], index: Images) -> None:
        for i in sorted(new):
            self.unwritten += json.dumps({"id": i, "image": index.name(i), "reason": new[i]}) + "\n"
        try:
            self.path.parent.mkdir(exist_ok=True)
            append_whole(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            log.warning("%s cannot be written (%s): its lines are kept and written later", self.path, error.strerror)
        first = min(new)
        log.warning(
            "%s more broken images are replaced, %s in all, first %s (%s)",
            f"{len(new):,}",
            f"{len(self.told):,}",
            index.name(first),
            new[first],
        )


def _read(path: Path) -> dict[int, str]:
    """Ids and reasons; a last line that a killed run has left unfinished is cut off."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    write_whole(path, "".join(lines))
    return {row["id"]: row["reason"] for row in map(json.loads, lines)}
