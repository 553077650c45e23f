"""The planner against real engines, real tensors, real checkpoints; its words as they are typed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, tasks

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.models import build_model
from mixmim_ds.plan_memory import count, model_on_meta, states
from mixmim_ds.plan_run import GPUS, micro_batches, parse, plan
from mixmim_ds.plan_time import Machine, checkpoint_bytes, seconds_per_image, step_of, traffic
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.metrics import PEAK_FLOPS

STAGE_NUMBERS = (1, 2, 3)
TINY = ["model=tiny", "data=synthetic", "train.global_batch=32", "train.micro_batch=8"]
Held = dict[int, tuple[PretrainConfig, dict[str, Any]]]


def tiny(*overrides: str) -> PretrainConfig:
    return load_config(["run_dir=DIR", *TINY, *overrides])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Of a run of two processes under each ZeRO stage: its options, and what tests/states.py wrote down.

    The files are the shipped ones with buckets of the size of such a model: theirs would outweigh it.
    """
    folder = tmp_path_factory.mktemp("stages")
    for stage in STAGE_NUMBERS:
        settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        zero = settings["zero_optimization"]
        settings["zero_optimization"] = zero | {key: 500_000 for key in zero if "bucket_size" in key}
        (folder / f"{stage}.json").write_text(json.dumps(settings))
    tasks(*TINY, *(f"ds={folder}/{stage}.json" for stage in STAGE_NUMBERS), script="tests/states.py")
    return {
        stage: (tiny(f"ds={folder}/{stage}.json", f"run_dir={folder}/{stage}"),
                json.loads((folder / str(stage) / "held.json").read_text()))
        for stage in STAGE_NUMBERS
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_states_are_those_of_the_engine(stage: int, held: Held) -> None:
    config, found = held[stage]
    model = model_on_meta(config.model, config.precision)
    planned = states([p.numel() for p in model.parameters()], config, 2)
    for kind in ("weights", "gradients", "masters", "moments"):
        # The engine pads its vectors to whole shares.
        assert getattr(planned, kind) == pytest.approx(found[kind], rel=1e-3), kind
    assert planned.buckets >= found["buckets"]
    # All that was alive at once, whatever DeepSpeed may have made, is planned for, with little to spare: a bucket and
    # the turn of the passes, which need not coincide, are added up.
    assert 0.94 * planned.total(count(model, 8)[1]) < found["peak"] <= planned.total(count(model, 8)[1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_what_is_sent_is_what_the_engine_sends(stage: int, held: Held) -> None:
    config, found = held[stage]
    total = sum(p.numel() for p in model_on_meta(config.model, config.precision).parameters())
    planned, moved = traffic(total, config, gpus=2, accumulation=2), found["moved"]
    # Of two processes in a ring each sends a whole tensor for an all-reduce, and half of it for the other two.
    gradients = moved["allreduce_"] if stage < 3 else moved["_reduce_scatter_base_"] / 2
    assert planned.gradients == pytest.approx(gradients, rel=1e-3)
    share = moved["_allgather_base_"] / 2 / planned.weights
    # ZeRO-3 keeps small parameters whole, and those of this model are small.
    assert share == pytest.approx(1, rel=1e-3) if stage < 3 else 0.5 < share <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_a_step_takes_no_more_collectives_than_it_did(stage: int, held: Held) -> None:
    """As counted once; more of them, of the same bytes, would be a bucket or a hook that does not do its work."""
    most = {
        1: {"allreduce_": 1, "_allgather_base_": 2},
        2: {"allreduce_": 27, "_allgather_base_": 2},
        3: {"allreduce_": 2, "_allgather_base_": 134, "_reduce_scatter_base_": 24},
    }[stage]
    calls = held[stage][1]["calls"]
    assert calls.keys() == most.keys() and all(calls[name] <= most[name] for name in most), calls


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_a_checkpoint_is_as_large_as_planned(stage: int, held: Held) -> None:
    config, _ = held[stage]
    model = build_model(config.model)
    total = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for name, b in model.state_dict().items() if name not in dict(model.named_parameters()))
    folder = Path(config.run_dir) / "checkpoints" / "step_00000002"
    size = sum(file.stat().st_size for file in folder.iterdir())
    # Names and shapes are pickled along, some ten kB a file whatever the model: this one has 60 MB in three files.
    assert checkpoint_bytes(total, buffers, config, 2) == pytest.approx(size, rel=5e-3)


def test_batch_and_length_are_the_engines() -> None:
    length = ["images=7700", "train.epochs=3", "train.max_steps=22", "train.save_every=7"]
    batch = ["train.global_batch=768", "nodes=3", "gpus_per_node=4", "train.micro_batch=32"]
    done = plan(*parse(["model=tiny", *length, *batch]))
    assert (done.steps, done.saves) == (22, 4), "the last step is saved, too"
    assert done.config.train.micro_batch * done.words.gpus * accumulation(done.config, done.words.gpus) == 768
    assert done.step.accumulation == accumulation(done.config, 12)
    assert all(step.global_batch == 768 for step in done.strong) and {s.gpus for s in done.strong} == {4, 8, 16, 32, 64}
    assert micro_batches(48, 4) == [12, 6, 4, 2]


def test_the_setting_taken_splits_and_recomputes_no_more_than_it_must() -> None:
    machine = ["model=tiny", "model.img_size=896", "gpu=a100_40", "gpus_per_node=1"]
    roomy = plan(*parse([*machine, "train.micro_batch=128"]))
    assert (roomy.chosen.ds, roomy.chosen.mode, roomy.chosen.micro_batch) == ("zero1", "none", 128)
    tight = plan(*parse([*machine, "train.micro_batch=256"]))
    assert (tight.chosen.ds, tight.chosen.mode, tight.chosen.micro_batch) == ("zero1", "full", 256)
    for done in (roomy, tight):
        assert done.chosen.total <= done.words.budget < 0.9 * 40e9 + 1
        row = next(row for row in done.rows if (row.ds, row.mode) == (done.chosen.ds, done.chosen.mode))
        assert row == done.chosen
        assert {step.micro_batch for step in done.strong} <= set(range(done.chosen.largest + 1))
        assert {(step.micro_batch, step.accumulation) for step in done.weak} == {
            (done.chosen.micro_batch, 2048 // done.chosen.micro_batch)
        }
    assert roomy.note.endswith("GiB, fits.") and tight.note.endswith("GiB, does not fit.")
    with pytest.raises(ValueError, match="nothing fits into gpu=a100_40 with 10% to spare, not even 2 images"):
        plan(*parse([*machine, "model.img_size=28672"]))


def test_what_a_run_refuses_is_not_planned() -> None:
    done = plan(*parse(["model=tiny", "compile=true", "ds=zero3"]))
    assert "activation_checkpointing=none: compile=true does not go with ZeRO-3" in done.note
    assert {row.ds for row in done.rows} == {"zero1", "zero2"}
    with pytest.raises(ValueError, match="not even 2 images under ds=zero2 and act.*; compile=false allows ds=zero3"):
        plan(*parse(["model=tiny", "compile=true", "gpu=a100_40", "model.img_size=28672"]))


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    gpu, host = (states([1000, 1000], tiny(f"ds={ds}"), 2) for ds in ("zero3", "zero3_offload"))
    assert gpu.gradients and host == replace(gpu, gradients=0, masters=0, moments=0, step=0)


def test_time_is_the_arithmetic_it_says(tmp_path: Path) -> None:
    assert seconds_per_image(10**9, "none", 1e12, 0.5) == pytest.approx(3 * 10**9 / 5e11)
    assert seconds_per_image(10**9, "full", 1e12, 0.5) == pytest.approx(4 * 10**9 / 5e11)
    machine = Machine(gpus_per_node=4, nvlink_gbs=100, link_gbs=10)
    assert machine.link(4) == 100e9 and machine.link(8) == 40e9 and replace(machine, link_gbs=50).link(8) == 100e9
    step = step_of(tiny(), 10**9, gpus=8, accumulation=2, image_s=0.01, machine=machine)
    sent = 7 / 8 * (2 * 4 + 2) * 1e9
    assert step.sent_gb == pytest.approx(sent / 1e9) and step.waiting_s == pytest.approx(sent / 40e9)
    assert step.computing_s == pytest.approx(2 * 8 * 0.01) and step.hideable == 0, "ZeRO-1 in bf16 reduces at the end"
    other = step_of(tiny("ds=zero2"), 10**9, gpus=8, accumulation=2, image_s=0.01, machine=machine)
    assert other.hideable == pytest.approx(min(7 / 8 * 16 / 40, 2 / 3 * 0.16) / other.sending_s)
    assert other.waiting_s == other.sending_s, "the shipped file does not overlap"
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["zero_optimization"] |= {"overlap_comm": True, "use_multi_rank_bucket_allreduce": False}
    (tmp_path / "own.json").write_text(json.dumps(settings))
    config = tiny(f"ds={tmp_path / 'own.json'}", "activation_checkpointing=full")
    own = step_of(config, 10**9, gpus=8, accumulation=2, image_s=0.01, machine=machine)
    assert own.sending_s == pytest.approx(7 / 8 * (8 + 2) / 40)
    assert own.waiting_s == pytest.approx(own.sending_s - 3 / 4 * 0.16), "a backward pass repeats the forward pass"
    assert all(gpu.peak in PEAK_FLOPS for gpu in GPUS.values())


MISTAKES = {
    "node=4": "node is no option; did you mean nodes",
    "nodes=many": "nodes=many must be a whole number",
    "link_gbs=-1": "link_gbs=-1.0 must be positive",
    "gpu=v100": "gpu=v100 must be one of a100_40, a100_80, h100, h200",
    "mfu=40": "mfu=40.0 must be a share",
    "gpus_per_node=3": "does not divide into even micro-batches on 3 GPUs; make it a multiple of 6",
    "images=100": "images=100 are less than one train.global_batch=2048",
    "train.epoch=3": "train.epoch is no option; did you mean train.epochs",
    "model.img_size=100": "img_size=100x100 must be a multiple of 32",
    "ds=zero9": "ds=zero9 is no DeepSpeed config",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_one_sentence(word: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[word]):
        plan(*parse(["model=tiny", word]))


def planned_by(*words: str, code: int = 0) -> str:
    return tasks(*words, processes=1, code=code, script="launch/plan.py")


@pytest.mark.slow
def test_the_command_as_typed() -> None:
    printed = planned_by("+experiment=mixmim_b", "nodes=2", "--json", "gpus_per_node=8", "gpu=h100", "img_s=1500")
    assert "batch           128 img/GPU x 16 GPUs x 1 accumulation = 2048 img/step" in printed
    assert "ds=zero1 train.micro_batch=128 activation_checkpointing=none" in printed
    assert "1500 img/s (given as measured)" in printed and "mfu" not in printed.splitlines()[-2]
    found = json.loads(printed.splitlines()[-1])
    assert found["config"]["train"]["micro_batch"] == 128 and found["chosen"]["ds"] == "zero1"
    assert found["steps"] == 600 * (1_281_167 // 2048) and {row["ds"] for row in found["rows"]} == {"zero1", "zero2"}
    assert found["run_s"] == pytest.approx(
        found["steps"] * (128 / 1500 + found["step"]["waiting_s"]) + found["saves"] * found["checkpoint_s"]
    )
    assumed = planned_by("model=tiny", "mfu=0.1")
    flops = 3 * build_model(load_config(["run_dir=DIR", "model=tiny", "data=synthetic"]).model).flops_per_image()
    assert f"{flops / 1e9:.1f} GFLOP an image and step" in assumed
    assert f" {0.1 * 989e12 / flops:.0f} img/s at mfu=0.1" in assumed
    first = re.findall(r"^(strong|weak).*  ([\d.]+%)$", assumed, re.MULTILINE)
    assert [first[0], first[5]] == [("strong", "100.0%"), ("weak", "100.0%")]
    assert "mfu=0.1 (assumed, give img_s=N; base reached 0.2 with compile=true activation_checkpointing=s" in assumed
    told = planned_by("model=tiny", "gpu=v100", code=2)
    assert [line for line in told.splitlines() if line.startswith("error: ")] and "Traceback" not in told


def test_without_a_rate_no_time_is_invented() -> None:
    words, config = parse(["model=tiny", "precision=fp32"])
    assert plan(words, config).step is None
    assert plan(replace(words, img_s=100.0), config).step is not None
