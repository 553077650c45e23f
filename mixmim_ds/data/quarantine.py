"""Broken images met during training: found, remembered, and replaced by the plan's next choice.

The images of a batch that failed are tried alone (`recover`), with the same window, and a place in the global batch
gets the first of its choices that decodes. That depends on neither the rank nor what is remembered: the window counts
because of a JPEG that is cut off below it, which decodes, and the memory only says which images to try before they
spoil a batch.
"""

from collections.abc import Callable

import numpy as np
import torch

from mixmim_ds.data.dali import Fed
from mixmim_ds.data.plan import MicroBatchPlan, Plan
from mixmim_ds.data.recover import DataFailed, OpenPipeline, find_broken, why_broken
from mixmim_ds.data.shards import Images

CHOICES = 32  # per place; with even two thirds of the images broken all of them fail once in half a million


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

    def micro_batch_at(self, step: int, k: int) -> MicroBatchPlan:
        """Micro-batch k of `step`, remembered images tried and replaced; unknown broken ones may be in it.

        Raises:
            DataFailed: as `examine`.
        """
        batch = self.plan.micro_batch_at(step, k)
        suspects = [place for place, i in enumerate(batch.ids.tolist()) if i in self.bad]
        return self._settle(step, k, np.array(suspects)) if suspects else batch

    def examine(self, step: int, k: int) -> bool:
        """Tries all images of a micro-batch that failed, and the choices after the broken ones.

        Returns:
            Whether a broken image was found that was not known.

        Raises:
            DataFailed: all choices of a place fail.
        """
        known = len(self.bad)
        self._settle(step, k, np.arange(self.plan.micro_batch))
        return len(self.bad) > known

    def _settle(self, step: int, k: int, places: np.ndarray) -> MicroBatchPlan:
        """Micro-batch k of `step` with, in these places of it, int [n], the first choices that decode."""
        choices = np.zeros(self.plan.micro_batch, np.int64)
        found: dict[int, str] = {}
        for _ in range(CHOICES):
            batch = self.plan.micro_batch_at(step, k, choices)
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

        def fed(i: int) -> Fed:
            one = places[[i]]
            return self.fed(MicroBatchPlan(batch.ids[one], batch.windows[one], batch.flips[one], batch.mask))

        return places[find_broken(fed, len(places), self.open_pipeline, self.device)]
