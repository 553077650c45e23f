"""Two steps of a run on random pixels, which write down what this process holds and sends: run_dir/held.json of rank 0.

One run for each `ds=FILE` among the arguments, one after the other in the same processes. The decoder's attention is
PyTorch's plain one, which the meta device takes as well, so that the planner can be compared with it.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.models import build_model
from mixmim_ds.plan_memory import Ledger
from mixmim_ds.train.checkpoint import Saver
from mixmim_ds.train.distributed import World, connect, disconnect
from mixmim_ds.train.engine import accumulation, build_engine
from mixmim_ds.train.restore import master_vectors


class Observer(Ledger):
    """A ledger that also counts collectives by kind, and the bytes of the largest list of tensors that each moves."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__(known)
        self.moved: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and function.__name__ != "barrier":
            lists = [[t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args]
            name = function.__name__.split(".")[0]
            self.moved[name] += max(map(sum, lists))
            self.calls[name] += 1
        return super().__torch_dispatch__(function, types, args, kwargs)


def held(engine: DeepSpeedEngine) -> dict[str, list[Tensor]]:
    """The tensors of each kind, by what DeepSpeed calls them in its three optimizers."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    states = [state for state in optimizer.optimizer.state.values() if state]
    partitions = getattr(optimizer, "averaged_gradients", {}).values()
    shares = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    summed = getattr(optimizer, "grad_partitions_flat_buffer", None)
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    return {
        "weights": [*(parameter.data for parameter in parameters), *shares],
        "gradients": [
            *(parameter.grad for parameter in parameters if parameter.grad is not None),
            *getattr(optimizer, "fp32_groups_gradients_flat", []),
            *(group.flat_partition for group in partitions if hasattr(group, "flat_partition")),
            *([] if summed is None else [summed]),
        ],
        "masters": master_vectors(engine),
        "moments": [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")],
        "buckets": [bucket.buffer for bucket in buckets if isinstance(bucket.buffer, Tensor)],
    }


def sizes(kinds: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes of their storages, each counted once."""
    return {
        kind: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        for kind, tensors in kinds.items()
    }


def observe(config: PretrainConfig, world: World) -> None:
    """Trains and saves."""
    torch.manual_seed(0)
    engine = build_engine(config, build_model(config.model), world)
    grid, size = engine.module.grid, config.model.img_size
    at_start = held(engine)
    known = [tensor for tensors in at_start.values() for tensor in tensors]
    with Observer([*known, *engine.module.buffers()]) as observer, sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            observer.moved.clear(), observer.calls.clear()
            for _ in range(accumulation(config, world.size)):
                images = torch.randn(config.train.micro_batch, 3, size, size)
                loss, prediction = engine(images, torch.zeros(grid, dtype=torch.bool))
                weights = sizes(held(engine))["weights"]
                engine.backward(loss)
                found = sizes(held(engine)) | {"weights": weights}
                engine.step()
    found["peak"] = sum(sizes(at_start).values()) + observer.peak
    Path(config.run_dir).mkdir(exist_ok=True)
    Saver(engine, config, world, 0).save(2, must=True)
    if world.first:
        (Path(config.run_dir) / "held.json").write_text(
            json.dumps({**found, "moved": observer.moved, "calls": observer.calls})
        )


files = [word for word in sys.argv[1:] if word.startswith("ds=")]
others = [word for word in sys.argv[1:] if not word.startswith("ds=")]
world = connect(timeout_s=300)
for file in files:
    observe(load_config([*others, file, f"run_dir={Path(file.removeprefix('ds=')).with_suffix('')}"]), world)
disconnect()
