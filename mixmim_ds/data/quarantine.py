"""Broken images met during training: found, remembered, and replaced by the plan's next choice.

DALI fails as a batch and does not say which file it was. So the images of a failed batch are tried alone, through the
same graph and with the same window, and a place in the global batch gets the first of its choices that decodes. That
depends on neither the rank nor what is remembered: the window counts because of a JPEG that is cut off below it, which
decodes, and the memory only says which images to try before they spoil a batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from mixmim_ds.data.dali import DecodeError, Fed, Feed, run_pipeline
from mixmim_ds.data.plan import MicroBatchPlan, Plan
from mixmim_ds.data.scan import open_image, reason_of
from mixmim_ds.data.shards import Images

CHOICES = 32  # per place; with even two thirds of the images broken all of them fail once in half a million


class DataFailed(Exception):
    """No batch can be had, and not because of single images; one sentence for the user."""


class Quarantine:
    """Micro-batches of a plan whose broken images are replaced.

    Args:
        open_pipeline: builds the pipeline of a feed, for a number of images a batch and of batches ahead.
        fed: what a pipeline is fed for a micro-batch, or for a part of one.
    """

    def __init__(
        self,
        index: Images,
        plan: Plan,
        device: torch.device,
        open_pipeline: Callable[[Feed, int, int], Pipeline],
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
            found |= {i: self._reason(i) for i in batch.ids[places].tolist() if i not in self.bad}
            choices[places] += 1
        i, reason = next(iter(found.items()), (int(batch.ids[places[0]]), "broken"))
        raise DataFailed(
            f"{CHOICES} images in a row cannot be decoded, the first is {self.index.name(i)} ({reason}): see that "
            "data.root can be read and has not changed since the run began, then start the same command again."
        )

    def _failing(self, batch: MicroBatchPlan, places: np.ndarray) -> np.ndarray:
        """Those of the places whose image cannot be decoded alone; a pipeline serves until it has failed."""
        failing = []
        while places.size:
            pipeline = self.open_pipeline(self._one_by_one(batch, places), 1, 1)
            tried = 0
            try:
                for _ in places:
                    tried += 1
                    run_pipeline(pipeline, self.device)
            except DecodeError:
                failing.append(places[tried - 1])
            places = places[tried:]
        return np.array(failing, np.int64)

    def _one_by_one(self, batch: MicroBatchPlan, places: np.ndarray) -> Feed:
        def feed(iteration: int) -> Fed:
            one = places[[min(iteration, len(places) - 1)]]  # the pipeline reads ahead
            return self.fed(MicroBatchPlan(batch.ids[one], batch.windows[one], batch.flips[one], batch.mask))

        return feed

    def _reason(self, i: int) -> str:
        """Why image i, which DALI does not decode, is broken; DALI itself does not tell it for a file."""
        try:
            with self.index.open(i) as file, open_image(file) as image:
                image.load()
            return "DALI does not decode it, although PIL does"
        except Exception as error:  # whatever strikes a parser that meets arbitrary bytes
            return reason_of(error)
