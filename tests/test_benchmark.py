"""The benchmarks: what they compare is the same computation, and the commands say what they measured."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import tasks
from torch.autograd import DeviceType

from mixmim_ds.benchmark import train
from mixmim_ds.benchmark.disk import scratch
from mixmim_ds.benchmark.largest import largest_even, largest_micro_batch, with_micro_batch
from mixmim_ds.benchmark.plain import PlainMixMIM
from mixmim_ds.benchmark.profile import table
from mixmim_ds.benchmark.sides import PHASES, time_steps
from mixmim_ds.benchmark.timing import in_turn, medians
from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.models import MixMIM
from mixmim_ds.train.distributed import World, connect, disconnect


def test_the_plain_method_computes_the_same() -> None:
    torch.manual_seed(0)
    for size, options in ((64, {}), (128, {"norm_pix_loss": False})):
        model = MixMIM("mixmim_tiny", size, decoder_dim=64, decoder_depth=2, decoder_num_heads=4, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)  # zeros and ones would hide errors
        plain, grid = PlainMixMIM(model), (size // 32, size // 32)
        images, mask = torch.randn(4, 3, size, size), torch.rand(grid) < 0.5
        (loss, prediction), (plain_loss, plain_prediction) = model(images, mask), plain(images, mask)
        torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain_prediction, prediction, rtol=1e-4, atol=1e-4)
        (loss + plain_loss).backward()
        ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            scale = max(parameter.grad.abs().max().item(), 1.0)
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


def bench(*words: str, processes: int = 1) -> dict[str, Any]:
    """What a command printed on its last line."""
    printed = tasks(*words, processes=processes, script="launch/benchmark.py").splitlines()
    found = json.loads(printed[-1])
    assert found["benchmark"] == words[0] and found["versions"]["torch"] == torch.__version__.partition("+")[0]
    head = f"deepspeed --num_gpus {processes}" if processes > 1 else "python"
    assert found["command"].startswith(f"{head} launch/benchmark.py {words[0]} ")
    row = next(line for line in reversed(printed) if line.startswith("|"))
    assert row.count("|") == 6 and found["date"] in row and "cores of" in row, row
    return found


TINY = ("model=tiny", "model.img_size=64", "precision=fp32", "--repeats=2", "--warmup=1")


def test_attention_times_every_way_of_every_stage() -> None:
    found = bench("attention", *TINY, "train.micro_batch=2")
    assert len(found["layers_s"]) == 4
    for layer in found["layers_s"]:
        assert layer.keys() == {"plain", "masked pairs", "sequences", "linears"} and min(layer.values()) > 0


def test_a_folder_to_measure_is_named_as_a_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for word in ("run_dir=.", "run_dir=~"):
        with scratch([word]) as name:
            assert Path(name).is_absolute() and Path(name).parent == tmp_path


def test_train_says_where_the_time_goes() -> None:
    found = bench("train", *TINY, "train.micro_batch=4", "train.global_batch=8", "--profile")
    ours = found["ours"]
    assert (found["micro_batch"], found["accumulation"], found["processes"]) == (4, 2, 1)
    assert ours["images_per_s"] == pytest.approx(8 / ours["step_s"], rel=0.01)
    assert 0 < ours["forward_s"] < ours["step_s"] and 0 < ours["backward_s"] < ours["step_s"]
    assert ours["mfu"] is None and found["memory_gib"] > 0.1, "this test is of the CPU"


def test_a_kernel_is_counted_with_the_operator_that_launches_it() -> None:
    def entry(key: str, kind: DeviceType, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(key=key, count=1, device_type=kind, self_device_time_total=microseconds)

    entries = [entry("gemm_kernel", DeviceType.CUDA, 3e6), entry("aten::mm", DeviceType.CPU, 3e6)]
    lines = table("ours", entries, torch.device("cuda"))
    assert lines[3:] == ["| `aten::mm` | 1 | 3.000 | 100.0% |", "| all | | 3.000 | |"]


def test_two_processes_tell_what_they_send() -> None:
    found = bench("train", *TINY, "train.micro_batch=4", processes=2)
    assert found["processes"] == 2
    assert 0 < found["communication_s"] < 60
    assert found["ours"]["images_per_s"] == pytest.approx(8 / found["ours"]["step_s"], rel=0.01)


def test_against_reference_compares_the_same_computation() -> None:
    found = bench("train", *TINY, "train.micro_batch=4", "--against=reference")
    assert max(found["first_loss"].values()) == pytest.approx(min(found["first_loss"].values()), rel=1e-5)
    assert found["ratio"] == pytest.approx(found["plain"]["step_s"] / found["ours"]["step_s"], rel=0.01)


def test_sides_take_turns_and_medians_are_theirs() -> None:
    times = {"ours": iter([9.0, 1.0, 3.0, 2.0]), "plain": iter([9.0, 6.0, 4.0, 5.0])}
    called: list[str] = []

    def side(name: str) -> dict[str, float]:
        called.append(name)
        return {"step_s": next(times[name])}

    rows = in_turn({name: partial(side, name) for name in times}, warmup=1, repeats=3)
    assert called == ["ours", "plain", "plain", "ours", "ours", "plain", "plain", "ours"]
    assert medians(rows["plain"])["step_s"] / medians(rows["ours"])["step_s"] == 2.5


def test_phases_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow:
        def forward(self, batch: object) -> None:
            now[0] += 2

        def backward(self, loss: object) -> None:
            now[0] += 4

        def update(self) -> None:
            now[0] += 8

    def batches() -> Iterator[None]:
        while True:
            now[0] += 1
            yield None

    found = time_steps(Slow(), batches(), turns=2, steps=3, device=torch.device("cpu"))
    assert found == {"step_s": 30, "data_s": 2, "forward_s": 4, "backward_s": 8, "optimizer_s": 16}


def test_rates_and_ratios_are_the_arithmetic_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 images in 2 s on 2 GPUs are 16 a second on each: 3 x 16 x 1 GFLOP of a peak of 1 TFLOP/s."""
    monkeypatch.setattr(train, "peak_flops", lambda precision: 1e12)
    config = load_config(["run_dir=DIR", "data=synthetic", "train.global_batch=64", "train.micro_batch=32"])
    rows = [{"step_s": seconds, "forward_s": seconds / 4, "backward_s": seconds / 2} for seconds in (1.0, 2.0, 5.0)]
    ours = train._rates(config, World(0, 2, torch.device("cpu"), None), rows, 10**9)
    assert (ours["images_per_s"], ours["images_per_s_per_gpu"], ours["mfu"]) == (32, 16, 0.048)
    assert (ours["step_s"], ours["fastest_step_s"], ours["step_s_range"]) == (2, 1, "(1 to 5)")
    plain = {"step_s": 3.0, "fastest_step_s": 2.5, "forward_s": 1.0, "backward_s": 0.8}
    loop = {"step_s": 4.0, "fastest_step_s": 5.0, "forward_s": 1.0, "backward_s": 2.0}
    assert train._ratios({"ours": ours, "plain": plain, "ours_in_plain_loop": loop}) == {
        "ratio": 1.5, "ratio_forward_backward": 1.2, "ratio_of_fastest": 2.5, "ratio_in_plain_loop": 0.75,
        "ratio_in_plain_loop_forward_backward": 0.6, "ratio_in_plain_loop_of_fastest": 0.5,
    }  # fmt: skip


def test_loader_compares_with_torchvision(photographs: Path) -> None:
    found = bench(
        "loader", f"data.root={photographs}", f"data.index_dir={photographs.parent / 'index'}", "model.img_size=64",
        "train.micro_batch=8", "--batches=3", "--threads=2", "--repeats=2", "--warmup=0",
    )  # fmt: skip
    dali, torchvision = found["by_threads"]["2"]["dali"], found["by_threads"]["2"]["torchvision"]
    assert dali["images_per_s_per_thread"] == pytest.approx(dali["images_per_s_per_gpu"] / 2, abs=0.01)
    assert found["by_threads"]["2"]["ratio"] == pytest.approx(
        dali["images_per_s_per_gpu"] / torchvision["images_per_s_per_gpu"], rel=0.01
    )
    assert found["images"] == 300


@pytest.mark.slow
def test_checkpoint_and_convert_leave_nothing(tmp_path: Path) -> None:
    saved = bench("checkpoint", *TINY, "--repeats=1", "--warmup=0", f"run_dir={tmp_path}")
    assert saved["bytes"] > 12 * 1.8e6 and saved["save_s"] > 0 and saved["resume_s"] > 0
    words = ("model=tiny", "precision=fp32", "train.micro_batch=4", "--repeats=1", "--warmup=0")
    exported = bench("convert", *words, f"run_dir={tmp_path}")
    assert exported["convert_s"] > 0 and 0.1 < exported["peak_memory_gib"] < 8
    assert 4 * 1.8e6 < exported["export_bytes"] < exported["checkpoint_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--repeats=0"], "--repeats must be at least 1"),
        (["train", "train.micro_bach=4"], "did you mean train.micro_batch?"),
        (["train", "train.micro_batch=3"], "must be even"),
        (
            ["train", "train.micro_batch=2", "train.global_batch=4", "--against=reference"],
            "leave train.global_batch out",
        ),
        (["train", "model.group_attention=false", "--against=reference"], "leave model.group_attention and"),
        (["train", "--find-micro-batch", "train.micro_batch=2"], "would not heed train.micro_batch=2"),
        (["loader"], "data.root is not set"),
        (["loader", "data.root=DIR", "--threads=0"], "--threads=0 must be positive"),
        (["loader", "data=synthetic"], "give data.root=DIR"),
        (["checkpoint", "data.root=DIR"], "leave data.root out"),
        (["convert", "run_dir=/nowhere"], "run_dir=/nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str) -> None:
    printed = tasks(*words, processes=1, code=2, script="launch/benchmark.py")
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0] and "Traceback" not in printed, printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU: would check that a CPU refuses to search")
def test_the_search_needs_a_gpu() -> None:
    printed = tasks("train", "--find-micro-batch", processes=1, code=2, script="launch/benchmark.py")
    assert "--find-micro-batch needs a GPU" in printed


@pytest.mark.parametrize("held", [0.0, 0.3])
@pytest.mark.parametrize("most", [0, 2, 3, 30, 64, 90, 201, 317, 480, 999])
def test_the_largest_even_number_is_found_in_a_few_trials(most: int, held: float) -> None:
    tried: list[int] = []

    def share(size: int) -> float | None:
        tried.append(size)
        # The line is a little off, one way or the other, as fragments and work space make it.
        return held + (1 - held) * size / (most * (0.97 if held else 1.03)) if size <= most else None

    found, largest = largest_even(share, limit=501), min(most - most % 2, 500)
    assert found <= largest and largest - found <= max(2, largest // 100), tried
    assert all(size % 2 == 0 and 0 < size <= 501 for size in tried) and len(set(tried)) == len(tried) <= 8, tried


def test_running_out_of_memory_ends_the_search() -> None:
    def step(config: PretrainConfig, most: int) -> float:
        assert config.train.global_batch == config.train.micro_batch
        if config.train.micro_batch > most:
            raise torch.OutOfMemoryError("an artificial limit")
        return config.train.micro_batch / (most + 1)

    config = load_config(["run_dir=DIR", "data=synthetic", "model=tiny"])
    assert largest_micro_batch(config, partial(step, most=5)) == 4
    with pytest.raises(ValueError, match="does not fit"):
        largest_micro_batch(config, partial(step, most=0))


GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: would find the largest micro-batch of the base model, and hold that the phases of a step, "
    "as CUDA events tell them, add up to its time by the host's clock",
)


@pytest.mark.gpu
@GPU
def test_the_largest_micro_batch_of_a_gpu() -> None:
    config = load_config(["run_dir=DIR", "data=synthetic", "model=base"])
    step = partial(train.attempt, [train.engine])
    size = largest_micro_batch(config, step)
    assert 0.9 < step(with_micro_batch(config, size)) <= 1
    with pytest.raises(torch.OutOfMemoryError):
        step(with_micro_batch(config, size + size // 40 * 2))


@pytest.mark.gpu
@GPU
def test_phases_add_up_to_the_step() -> None:
    config = load_config(["run_dir=DIR", "data=synthetic", "model=tiny", "train.global_batch=128"])
    world = connect(300)
    try:
        side, batches = train.engine(config, world), train.micro_batches(config, world)
        time_steps(side, batches, 1, 5, world.device)
        began = time.perf_counter()
        row = time_steps(side, batches, 1, 50, world.device)
        seconds = (time.perf_counter() - began) / 50
        assert sum(row[f"{phase}_s"] for phase in PHASES) == pytest.approx(row["step_s"], rel=1e-3)
        assert row["step_s"] == pytest.approx(seconds, rel=0.1)
    finally:
        disconnect()
