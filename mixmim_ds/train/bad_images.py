"""The broken images of a run, on whatever rank: those unreadable when they were indexed are told and counted, those met
later agreed on, named in the run folder and counted."""

import logging
from collections import ChainMap
from pathlib import Path

from mixmim_ds.config import DataConfig, RunConfig
from mixmim_ds.data.shards import Images
from mixmim_ds.json_lines import JsonLines
from mixmim_ds.train.distributed import RunFailed, World, gather, on_first_rank

log = logging.getLogger("mixmim_ds")


def check_share(data: DataConfig, images: Images, met: int = 0, where: str = "") -> None:
    """Counts the broken images of a set: those that its index leaves out, and those met in it.

    Args:
        where: what tells of those met.

    Raises:
        RunFailed: more than data.max_bad_share of the set.
    """
    broken, files = len(images.broken) + met, len(images) + len(images.broken)
    if broken > data.max_bad_share * files:
        where = where or "first {} ({})".format(*images.broken[0])
        raise RunFailed(
            f"{broken:,} of {files:,} images are broken, more than data.max_bad_share={data.max_bad_share} allows, "
            f"{where}: repair the data or raise data.max_bad_share, then start the same command again."
        )


def check_judged(data: DataConfig, images: Images, judged: int) -> None:
    """After an evaluation that could look at so many images of a set; a score of what happens to be whole misleads.

    Raises:
        RunFailed: as `check_share`.
    """
    met = len(images) - judged
    check_share(data, images, met, "those of an evaluation that the log names" if met else "")


def tell_unreadable(data: DataConfig, images: Images) -> None:
    """Warns of the files that an index leaves out.

    Raises:
        RunFailed: as `check_share`.
    """
    check_share(data, images)
    if images.broken:
        count, (name, reason) = len(images.broken), images.broken[0]
        log.warning(
            "%s files of data.root are no readable images and left out, first %s (%s)", f"{count:,}", name, reason
        )


class BadImages:
    """Adds to the loader's broken images those that other ranks, or earlier starts of the run, have met.

    failures/bad_images.jsonl holds one line each: id (row of the index), image (its name) and reason.
    """

    def __init__(self, config: RunConfig, world: World, index: Images | None, bad: dict[int, str]) -> None:
        """`bad` is the loader's."""
        self.data, self.world, self.index, self.bad = config.data, world, index, bad
        self.rows = JsonLines(Path(config.run_dir) / "failures" / "bad_images.jsonl")
        known = {row["id"]: row["reason"] for row in on_first_rank(world, lambda: self.rows.load(lambda row: True))}
        bad |= known
        self.told = set(known)

    def exchange(self) -> int:
        """All ranks tell each other what is new; the number of broken images of the run so far.

        Raises:
            RunFailed: as `check_share`.
        """
        met = dict(self.bad)  # a thread that reads ahead may add to it
        own = {i: reason for i, reason in met.items() if i not in self.told}
        new = dict(ChainMap(*gather(self.world, own)))
        self.bad |= new
        self.told |= set(new)
        if new and self.index is not None and self.world.first:
            self._write(new, self.index)
        if self.index is not None:
            check_share(self.data, self.index, len(self.told), f"see {self.rows.path}")
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
