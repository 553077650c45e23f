"""Whether every node is fit for a run, asked before it starts; who is not is named, nothing is excluded.

First every rank looks around by itself and reports to rank 0 (`word`). Only when all are well do they meet as the run
would.
"""

import json
import os
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixmim_ds.checkpoints import steps_of
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.data.loader import plan_of
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.device import on_gpu
from mixmim_ds.evaluate.features import load_encoder
from mixmim_ds.finetune_config import FinetuneConfig
from mixmim_ds.models import Classifier, build_model
from mixmim_ds.train.distributed import RankFailed, RunFailed, World, connected, gather, rank_before_connecting
from mixmim_ds.train.engine import Trained, engine_config
from mixmim_ds.train.finetune import RANDOM
from mixmim_ds.train.run_folder import check_run_folder, facts_of, unwritable
from mixmim_ds.train.slurm import leave_out, node, nodes, places
from mixmim_ds.train.word import first_does, open_store

BUSY = 0.1  # of a GPU's memory; drivers and idle daemons take less
CLOCKS_S = 5.0  # tokens, build tools and the reader of the logs get confused beyond that; NTP keeps milliseconds
PAYLOAD = 1 << 26  # bytes of the all-reduce, near the gradient buckets of ds_configs/
Config = PretrainConfig | FinetuneConfig


@dataclass
class Finding:
    """What a rank saw."""

    node: str
    facts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def healthcheck(config: Config, wait_s: int) -> None:
    """Checks all nodes of a job; every rank of the run must call it.

    Args:
        wait_s: seconds that nodes may take to answer.

    Raises:
        ValueError: an option does not go with the others, the data or the run folder.
        RunFailed: a node is not fit, or does not answer.
    """
    rank = rank_before_connecting()
    size = int(os.environ.get("WORLD_SIZE", 1))
    store = open_store(rank, config.train.start_timeout_s + 2 * wait_s)
    first_does(store, rank, size, "options", lambda: _check_options(config, size))
    store.set(f"finding {rank}", json.dumps(asdict(look(config))))
    first_does(store, rank, size, "findings", lambda: _check_nodes(config, _collect(store, size, wait_s)))
    _meet(wait_s)


def _check_options(config: Config, size: int) -> None:
    """Whether the options are in order as the first node sees them, and the run folder is to be had there; the other
    nodes then look for what this one leaves in it.

    Raises:
        ValueError: an option does not go with the others, the data or the run folder.
        OSError: the run folder cannot be written for now.
    """
    if isinstance(config, FinetuneConfig) and config.eval_only:
        raise ValueError("eval_only=true starts no run, which the check is for; take it out.")
    engine_config(config, size)
    _model_on_meta(config)
    _check_init(config)
    images, facts = _open(config, progress=True)
    if images:
        plan_of(config, images[0].sizes, (1, 1), 0.5)  # which wants images for a step
    if config.resume != "weights":
        check_run_folder(config, facts)
    try:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        _token(config).write_text(_signature())
    except OSError as error:
        with suppress(OSError):  # a full disk takes a file, but not what is in it
            _token(config).unlink()
        raise unwritable(Path(config.run_dir), error) from error


def _model_on_meta(config: Config) -> Trained:
    """The run's model: shapes without memory. ValueError if the options describe none."""
    with torch.device("meta"):
        if isinstance(config, FinetuneConfig):
            return Classifier(config.model.encoder, config.model.img_size, classes=1000)
        return build_model(config.model)


def _check_init(config: Config) -> None:
    """ValueError if fine-tuning is to start from what holds no encoder; a run that goes on needs it no more."""
    if isinstance(config, FinetuneConfig) and config.init != RANDOM and not steps_of(Path(config.run_dir)):
        load_encoder(config.init, config.train.seed, "init", head=True)


def _open(config: Config, progress: bool) -> tuple[list[Images], dict[str, Any]]:
    """The images to train on, if any, and those to judge by; the facts of the former."""
    if isinstance(config, FinetuneConfig):
        train, val = open_labelled(config.data, progress=progress)
        return [train.images, val.images], facts_of(train)
    index = open_images(config.data, progress)
    return [] if index is None else [index], facts_of(index)


def _token(config: Config) -> Path:
    return Path(config.run_dir) / "healthcheck"


def _signature() -> str:
    """Tells this check from others that have left their token in a folder of the same name."""
    return f"{os.environ.get('SLURM_JOB_ID')} {os.environ.get('MASTER_PORT')}"


def look(config: Config) -> Finding:
    """What this rank finds on its node."""
    finding = Finding(node())
    for view in (_gpu, _images, _run_folder):
        try:
            finding.facts.append(view(config))
        except ValueError as error:
            finding.faults.append(str(error).rstrip("."))
        except OSError as error:
            finding.faults.append(f"{error.filename or config.run_dir}: {error.strerror}")
        except RuntimeError as error:  # CUDA's, of a GPU that is sick
            finding.faults.append(str(error).partition("\n")[0].rstrip("."))
    return finding


def _gpu(config: Config) -> str:
    if not on_gpu():
        given = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
        if given and os.environ.get("DS_ACCELERATOR") != "cpu":
            raise ValueError(f"PyTorch finds none of the {given} GPUs that SLURM gave (nvidia-smi tells more)")
        return "CPU"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"PyTorch finds {torch.cuda.device_count()} GPUs, too few for rank {local_rank} there")
    free, total = torch.cuda.mem_get_info(local_rank)
    if free < (1 - BUSY) * total:
        raise ValueError(
            f"GPU {local_rank} is in use: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are taken"
        )
    return torch.cuda.get_device_name(local_rank)


def _images(config: Config) -> str:
    found, _ = _open(config, progress=False)
    for images in found:
        with images.open(0) as file:
            if not file.read(1):
                raise ValueError(f"{images.name(0)} of data.root={config.data.root} cannot be read")
    return f"images {' '.join(images.fingerprint[:8] for images in found)}" if found else "synthetic"


def _run_folder(config: Config) -> str:
    folder = Path(config.run_dir)
    if not _token(config).exists() or _token(config).read_text() != _signature():
        raise ValueError(f"run_dir={folder} is not the folder that {nodes()[0]} has under that name; it must be shared")
    probe = _token(config).with_suffix(f".{node()}.{os.getpid()}")
    probe.write_text("can be written")
    probe.unlink()
    free, two = shutil.disk_usage(folder).free, 2 * _checkpoint_bytes(config)
    if free < two:
        raise ValueError(
            f"run_dir={folder} has {free / 2**30:.1f} GiB left, two checkpoints take {two / 2**30:.1f} GiB; make room"
        )
    return "run_dir writable"


def _checkpoint_bytes(config: Config) -> int:
    """Masters, two moments and perhaps the average, in fp32."""
    average = 4 if isinstance(config, FinetuneConfig) and config.optim.ema_decay else 0
    parameters = sum(parameter.numel() for parameter in _model_on_meta(config).parameters())
    return (12 + average) * parameters


def _collect(store: dist.Store, size: int, wait_s: int) -> list[Finding]:
    """The findings of all ranks; those of a rank that has not answered in time say that."""
    keys = [f"finding {rank}" for rank in range(size)]
    try:
        store.wait(keys, timedelta(seconds=wait_s))
    except RuntimeError:
        silent = [f"no answer within {wait_s} s"]
        names = places()
        if len(names) != size:  # another launcher knows where, and says nothing
            names = [f"of rank {rank}" for rank in range(size)]
        return [
            Finding(**json.loads(store.get(key))) if store.check([key]) else Finding(name, [], silent)
            for name, key in zip(names, keys, strict=True)
        ]
    return [Finding(**json.loads(store.get(key))) for key in keys]


def _check_nodes(config: Config, findings: list[Finding]) -> None:
    """RunFailed if a node is not fit."""
    verdict = _judge(findings)
    _token(config).unlink(missing_ok=True)
    if verdict:
        raise RunFailed(verdict)


def _judge(findings: list[Finding]) -> str:
    """Prints a line for each node; the sentence that names those that are not fit, empty if all are."""
    usual = Counter(tuple(finding.facts) for finding in findings if not finding.faults).most_common(1)
    faults: dict[str, dict[str, None]] = {finding.node: {} for finding in findings}  # in order, each said once
    for finding in findings:
        faults[finding.node] |= dict.fromkeys(finding.faults)
        if usual and not finding.faults and tuple(finding.facts) != usual[0][0]:
            faults[finding.node][f"it has {', '.join(finding.facts)} where others have {', '.join(usual[0][0])}"] = None
    ranks = Counter(finding.node for finding in findings)
    for name, said in faults.items():
        facts = next((", ".join(finding.facts) for finding in findings if finding.node == name), "")
        print(f"healthcheck {name}: {ranks[name]} ranks, {'; '.join(said) or facts}", flush=True)
    bad = {name: "; ".join(said) for name, said in faults.items() if said}
    if not bad:
        return ""
    told = ". ".join(f"Node {name} is not fit: {said}" for name, said in bad.items())
    return f"{told}. Mend that{leave_out(bad)}."


def _meet(wait_s: int) -> None:
    """Clocks and interconnect, with all ranks together."""
    try:
        with connected(wait_s) as world:
            _compare_clocks(world)
            seconds = _time_all_reduce(world)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankFailed(
            f"the interconnect does not answer: {node()} cannot reach the others, or an all-reduce failed ({reason})."
        ) from error
    if world.first and world.size > 1:
        moved = 2 * (world.size - 1) / world.size * PAYLOAD
        print(
            f"healthcheck: {world.size} ranks on {', '.join(nodes())}; an all-reduce of {PAYLOAD >> 20} MiB takes "
            f"{seconds * 1e3:.1f} ms, {moved / seconds / 1e9:.2f} GB/s a rank",
            flush=True,
        )


def _compare_clocks(world: World) -> None:
    dist.barrier(group=world.control)
    clocks = gather(world, (time.time(), node()))
    middle = sorted(clocks)[len(clocks) // 2][0]
    astray = {name: clock - middle for clock, name in clocks if abs(clock - middle) > CLOCKS_S}
    if astray:
        told = ", ".join(f"{name} by {seconds:+.0f} s" for name, seconds in astray.items())
        raise RunFailed(f"clocks differ: {told}. Set them (NTP){leave_out(astray)}.")


def _time_all_reduce(world: World) -> float:
    """The least of three times, in seconds; the first also sets up the connections."""
    payload = torch.ones(PAYLOAD // 4, device=world.device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        dist.all_reduce(payload)
        payload[0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    return min(seconds)
