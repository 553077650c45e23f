"""One owner per setting; the optimizer's groups and its schedule."""

import json
import math
import traceback
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from mixmim_ds.compose import load_config
from mixmim_ds.config import ROOT, OptimConfig, PretrainConfig
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.models import MixMIM, build_model
from mixmim_ds.train.distributed import connected
from mixmim_ds.train.engine import accumulation, build_engine, engine_config, zero_stage
from mixmim_ds.train.optim import Schedule, parameter_groups


def config_with(*overrides: str) -> PretrainConfig:
    return load_config(["run_dir=DIR", "data.root=DIR", "precision=fp32", *overrides])


def test_accumulation_follows_from_batches_and_processes() -> None:
    assert accumulation(config_with(), 16) == 1
    assert accumulation(config_with("train.global_batch=4096", "train.micro_batch=64"), 8) == 8
    with pytest.raises(ValueError, match="train.global_batch=2048 is no multiple of train.micro_batch=128 x 12"):
        accumulation(config_with(), 12)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_file_joins_with_the_runs_options(path: Path) -> None:
    config = config_with(f"ds={path.stem}", "optim.clip_grad=3", "train.micro_batch=64", "precision=bf16")
    joined = engine_config(config, 4)
    assert joined["gradient_accumulation_steps"] == 8 and joined["train_batch_size"] == 2048
    assert joined["gradient_clipping"] == 3 and joined["bf16"] == {"enabled": True}
    assert joined["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    assert zero_stage(config) == joined["zero_optimization"]["stage"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"bf16": {"enabled": true}}', "sets bf16, which belongs to the option precision"),
        ('{"train_batch_size": 8}', "sets train_batch_size, which belongs to the option train.global_batch"),
        ('{"zero_optimisation": {"stage": 1}}', "sets zero_optimisation, which is no setting of a run; take it out or"),
        ('{"csv_monitor": {"enabled": true}}', "sets csv_monitor, which is no setting of a run; take it out or"),
        ('{"zero_optimization": {"stage": 0}}', "must set zero_optimization.stage to 1, 2 or 3"),
        ("{", "is no valid JSON"),
        ("[]", "must hold an object with another one in it"),
        ('{"zero_optimization": 2}', "must hold an object with another one in it"),
        ('{"zero_optimization": {"stage": 7}}', "must set zero_optimization.stage to 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1, "reduce_buket_size": 1}}', "reduce_buket_size, which DeepSpeed does not"),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}',
            "sets zero_optimization.reduce_bucket_size to -1: Input should be greater than 0.$",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"devize": "cpu"}}}',
            "sets zero_optimization.offload_optimizer.devize, which DeepSpeed does not know",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
            'wants "zero_force_ds_cpu_optimizer": false beside zero_optimization',
        ),
        ('{"zero_optimization": {"stage": 1, "round_robin_gradients": true}}', "round_robin_gradients, which spoils"),
    ],
)
def test_a_file_that_sets_what_it_does_not_own_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"ds: {path} .*{sentence}") as error:
        engine_config(config_with(f"ds={path}"), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ds", ["zero1", "zero2"])
def test_the_engine_waits_for_the_device_in_its_updates_alone(
    ds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where DeepSpeed waits for a GPU; the CPU has nothing to wait for."""
    words = ["model=tiny", "data=synthetic", "train.global_batch=8", "train.micro_batch=4", f"ds={ds}"]
    config = load_config([f"run_dir={tmp_path}", *words])
    with connected(60) as world:
        engine = build_engine(config, build_model(config.model), world)
        batches = open_loader(config, None, Share(0, 1, 2), world.device, cores=1).batches(0)
        waits: list[str] = []
        monkeypatch.setattr(get_accelerator(), "synchronize", lambda *of: waits.extend(traceback.format_stack()[-2:-1]))
        for _ in range(4):  # from its third step on it would measure its own throughput
            for _ in range(2):
                engine.backward(engine(*next(batches).inputs)[0])
                engine.step()
        assert not waits, "".join(waits)
        engine.destroy()


def test_decay_leaves_out_biases_and_norms_and_nothing_else() -> None:
    model = MixMIM("mixmim_tiny", 64, decoder_dim=64, decoder_depth=1, decoder_num_heads=2)
    decayed, plain = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    name = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(name)
    kinds = {name[id(p)].rsplit(".", 2)[-1] if "." in name[id(p)] else name[id(p)] for p in decayed["params"]}
    assert kinds == {"weight", "relative_position_bias_table", "mask_token"}
    assert all(p.ndim == 1 for p in plain["params"]) and all(p.ndim > 1 for p in decayed["params"])


def test_the_learning_rate_is_the_authors() -> None:
    schedule = Schedule(OptimConfig(warmup_epochs=40, min_lr=1e-6), global_batch=2048, steps_per_epoch=625, epochs=600)
    assert schedule.peak == 1.2e-3 and schedule.total_steps == 375_000
    assert schedule.lr_at(0) == 0 and schedule.lr_at(12_500) == pytest.approx(0.6e-3)
    assert schedule.lr_at(25_000) == pytest.approx(1.2e-3)
    assert schedule.lr_at(200_000) == pytest.approx((1.2e-3 + 1e-6) / 2)
    assert schedule.lr_at(375_000) == pytest.approx(1e-6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1)], lr=1.2e-3), T_max=350_000, eta_min=1e-6
    )
    # Its closed form is an independent implementation of the half cosine.
    for step in (25_001, 99_999, 374_999):
        scheduler.last_epoch = step - 25_000
        assert schedule.lr_at(step) == pytest.approx(scheduler._get_closed_form_lr()[0], rel=1e-9)


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    schedule = Schedule(OptimConfig(warmup_epochs=40), global_batch=256, steps_per_epoch=10, epochs=20)
    rates = [schedule.lr_at(step) for step in range(schedule.total_steps)]
    assert rates == sorted(rates) and math.isclose(rates[-1], 1.5e-4 * 199 / 400)
