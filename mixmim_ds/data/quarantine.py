"""Broken images met during training: found, remembered, and replaced by the plan's next choice.

The images of a batch that failed are tried alone (`recover`), with the same window, and a place in the global batch
gets the first of its choices that decodes. That depends on neither the rank nor what is remembered: the window counts
because of a JPEG that is cut off below it, which decodes, and the memory only says which images to look at before they
spoil a batch. Trying one costs a pipeline, so what came of it is remembered too, of the content and not of the image: a
file that is mended or comes back is tried again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from mixmim_ds.data.dali import Fed
from mixmim_ds.data.plan import MicroBatchPlan, Plan
from mixmim_ds.data.recover import UNEXPLAINED, DataFailed, OpenPipeline, find_broken, why_broken
from mixmim_ds.data.s3 import StorageDown
from mixmim_ds.data.shards import Images

CHOICES = 32  # per place; with even two thirds of the images broken all of them fail once in half a million


@dataclass
class Tried:
    """What tries of one content have shown, by the last row of a window, exclusive.

    Decoders go through an image from its top: where a window fails, so does any that ends there or below.
    """

    decodes: int = 0  # windows that end here or above
    fails: float = inf  # windows that end here or below

    def note(self, end: int, failed: bool) -> None:
        """What a window that ends there has come to."""
        if failed:
            self.fails = min(self.fails, end)
        else:
            self.decodes = max(self.decodes, end)


class Quarantine:
    """Micro-batches of a plan whose broken images are replaced.

    Args:
        fed: what a pipeline is fed for a micro-batch, or for a part of one.
    """

    def __init__(
        self,
        index: Images,
        plan: Plan,
        device: torch.device,
        open_pipeline: OpenPipeline,
        fed: Callable[[MicroBatchPlan], Fed],
    ) -> None:
        self.index, self.plan, self.device = index, plan, device
        self.open_pipeline, self.fed = open_pipeline, fed
        self.bad: dict[int, str] = {}  # reasons, by row of the index
        self.tried: dict[bytes, Tried] = {}  # by sha256 of the content

    def micro_batch_at(self, step: int, k: int) -> MicroBatchPlan:
        """Micro-batch k of `step`, broken images that are remembered replaced; unknown ones may be in it.

        Raises:
            DataFailed: as `examine`.
        """
        return self._settle(step, k, trusting=True)

    def examine(self, step: int, k: int) -> bool:
        """Tries all images of a micro-batch that failed, and the choices after the broken ones.

        Returns:
            Whether a broken image was found that was not known.

        Raises:
            DataFailed: all choices of a place fail.
        """
        known = len(self.bad)
        self._settle(step, k, trusting=False)
        return len(self.bad) > known

    def _settle(self, step: int, k: int, trusting: bool) -> MicroBatchPlan:
        """Micro-batch k of `step` with the first choices that decode.

        Args:
            trusting: images that are not remembered as broken are taken untried.
        """
        choices, places = np.zeros(self.plan.micro_batch, np.int64), np.arange(self.plan.micro_batch)
        found: dict[int, str] = {}
        for _ in range(CHOICES):
            batch = self.plan.micro_batch_at(step, k, choices)
            if trusting:
                places = places[[i in self.bad for i in batch.ids[places].tolist()]]
            places = self._failing(batch, places)
            if not places.size:
                self.bad |= found  # not before: where nothing decodes it is not the images
                return batch
            found |= {i: why_broken(self.index, i) for i in batch.ids[places].tolist() if i not in self.bad}
            choices[places] += 1
        i, reason = next(iter(found.items()), (int(batch.ids[places[0]]), "broken"))
        raise DataFailed(
            f"{CHOICES} images in a row cannot be decoded, the first is {self.index.name(i)} ({reason}): see that "
            "data.root can be read and has not changed since the run began, then start the same command again."
        )

    def _failing(self, batch: MicroBatchPlan, places: np.ndarray) -> np.ndarray:
        """Those of the places whose image cannot be decoded alone."""
        ends = (batch.windows[:, 0] + batch.windows[:, 2]).tolist()
        failing, untried = [], []
        for place, i in zip(places.tolist(), batch.ids[places].tolist(), strict=True):
            tried = self._tried(i) if i in self.bad else Tried()
            if ends[place] >= tried.fails:
                failing.append(place)
            elif ends[place] > tried.decodes:
                untried.append(place)

        def fed(number: int) -> Fed:
            one = untried[number : number + 1]
            return self.fed(MicroBatchPlan(batch.ids[one], batch.windows[one], batch.flips[one], batch.mask))

        broken = set(find_broken(fed, len(untried), self.open_pipeline, self.device).tolist())
        for number, place in enumerate(untried):
            i, failed = int(batch.ids[place]), number in broken
            # What PIL decodes may have failed for a moment, which says nothing of the content.
            if why_broken(self.index, i) != UNEXPLAINED if failed else i in self.bad:
                self._tried(i).note(ends[place], failed)
        return np.array(sorted(failing + [untried[number] for number in broken]), np.int64)

    def _tried(self, i: int) -> Tried:
        """What is known of image i as it is now; without content it fails."""
        try:
            with self.index.open(i) as file:
                content = file.read()
        except StorageDown:
            raise
        except OSError:
            content = b""
        return self.tried.setdefault(hashlib.sha256(content).digest(), Tried()) if content else Tried(fails=0)
