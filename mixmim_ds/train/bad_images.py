"""The broken images that a run has met, on whatever rank: agreed on, named in the run folder, counted."""

import logging
from collections import ChainMap
from pathlib import Path

from mixmim_ds.config import RunConfig
from mixmim_ds.data.shards import Images
from mixmim_ds.json_lines import JsonLines
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
        self.rows = JsonLines(Path(config.run_dir) / "failures" / "bad_images.jsonl")
        known = {row["id"]: row["reason"] for row in on_first_rank(world, lambda: self.rows.load(lambda row: True))}
        bad |= known
        self.told = set(known)

    def exchange(self) -> int:
        """All ranks tell each other what is new; the number of broken images of the run so far.

        Raises:
            RunFailed: more than data.max_bad_share of the data set.
        """
        met = dict(self.bad)  # a thread that reads ahead may add to it
        own = {i: reason for i, reason in met.items() if i not in self.told}
        new = dict(ChainMap(*gather(self.world, own)))
        self.bad |= new
        self.told |= set(new)
        if new and self.index is not None and self.world.first:
            self._write(new, self.index)
        if self.index is not None and len(self.told) > self.allowed:
            raise RunFailed(
                f"{len(self.told):,} of {len(self.index):,} images are broken, more than {self.option} allows, see "
                f"{self.rows.path}: repair the data or raise data.max_bad_share, then start the same command again."
            )
        return len(self.told)

    def _write(self, new: dict[int, str], index: Images) -> None:
        self.rows.add(*({"id": i, "image": index.name(i), "reason": new[i]} for i in sorted(new)))
        first = min(new)
        log.warning(
            "%s more broken images are replaced, %s in all, first %s (%s)",
            f"{len(new):,}",
            f"{len(self.told):,}",
            index.name(first),
            new[first],
        )
