"""The DALI pipeline: from a file, a crop window and a flip to pixels; on the GPU or, from the same graph, on the CPU.

It has no random operator and no state: what it reads is fed by the plan (DALI documentation: external_source,
decoders.image_slice, resize, crop_mirror_normalize).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mixmim_ds.data.index import Source

Fed = tuple[np.ndarray | list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]
Feed = Callable[[int], Fed]


class DecodeError(Exception):
    """An image of a batch cannot be read or decoded, DALI does not tell which; the pipeline is of no use after that."""


def build_pipeline(
    feed: Feed, source: Source, batch: int, img_size: int, device: torch.device, threads: int, prefetch: int
) -> Pipeline:
    """Crops of images, resized (antialiased bicubic) and flipped: uint8 [batch, 3, img_size, img_size].

    Args:
        feed: called with 0, 1, 2, ...; returns for one batch the images (see `source`), the corners int32 [batch, 2]
            and sizes int32 [batch, 2] of the windows (rows, columns), and the flips int32 [batch].
        source: what the feed gives of each image: "paths", NUL-padded in uint8 [batch, L], or "bytes", the content of
            its file in an uint8 array of its own.
        device: where the pixels end up; a GPU also decodes ("mixed"), a CPU decodes bit-exactly as PIL does.
        threads: CPU threads for reading and for what the GPU cannot decode.
        prefetch: batches worked on ahead.
    """
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipeline:
        pipeline.set_outputs(_graph(feed, source, img_size, on_gpu))
    pipeline.build()
    if not pipeline.exec_dynamic:
        raise RuntimeError("DALI's dynamic executor is off; batches that are still in use would be overwritten.")
    return pipeline


def _graph(feed: Feed, source: Source, img_size: int, on_gpu: bool) -> DataNode:
    """What happens to one batch, from its paths or bytes to its pixels."""
    # All or nothing: a share would let the place in the batch choose the decoder, and with it the pixels.
    hardware: dict[str, Any] = {"hw_decoder_load": 1.0} if on_gpu else {}
    encoded, corner, size, flip = fn.external_source(
        feed, num_outputs=4, batch=True, dtype=[types.UINT8] + 3 * [types.INT32], ndim=[1, 1, 1, 0]
    )
    if source == "paths":
        # mmap serialises opens, grows with every path and dies with SIGBUS when a file shrinks.
        encoded = fn.io.file.read(encoded, dont_use_mmap=True)
    # A header that does not parse takes the whole process down in the decoder, but is an exception here; and a
    # window from an outdated index stays inside the image.
    image = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[:2], dtype=types.INT32)
    size = math.min(size, image)
    corner = math.max(math.min(corner, image - size), 0)
    pixels = fn.decoders.image_slice(
        encoded,
        start=corner,
        shape=size,
        axes=[0, 1],
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        **hardware,
    )
    pixels = fn.resize(pixels, size=[img_size, img_size], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop_mirror_normalize(pixels, mirror=flip, dtype=types.UINT8, output_layout="CHW")


def run_pipeline(pipeline: Pipeline, device: torch.device) -> Tensor:
    """The next batch, without copying it: uint8 [batch, 3, img_size, img_size] on the pipeline's device.

    Raises:
        DecodeError: the batch cannot be had.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        (pixels,) = pipeline.run(stream) if stream is not None else pipeline.run()
    except RuntimeError as error:
        raise DecodeError(" ".join(str(error).split())) from error
    return torch.from_dlpack(pixels.as_tensor())
