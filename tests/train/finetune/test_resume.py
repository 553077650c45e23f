"""Fine-tuning as users run it: stopped, gone on with, begun anew, on other processes and stages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import tasks
from tuning import SCRIPT, STEPS, told

from mixmim_ds.train import finetune
from mixmim_ds.train.distributed import RunFailed
from mixmim_ds.zero_files import read_saved


@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_last_digit(
    straight: Path, options: list[str], tmp_path: Path
) -> None:
    """With random augmentation, mixup, cutmix, erasing, drop path and an average of the weights."""
    tasks(*options, f"run_dir={tmp_path}", "train.max_steps=4", script=SCRIPT)
    assert [row["step"] for row in told(tmp_path)[1]] == [4]
    tasks(*options, f"run_dir={tmp_path}", script=SCRIPT)
    steps, judged = told(tmp_path)
    assert steps == told(straight)[0] and len(steps) == STEPS
    assert [row for row in judged if row["step"] != 4] == told(straight)[1]


@pytest.mark.slow
def test_a_run_goes_on_and_is_judged_with_the_tables_that_init_gave_it(larger: list[str], tmp_path: Path) -> None:
    for name, ends in (("whole", [3]), ("broken", [2, 3])):
        for steps in ends:
            tasks(*larger, f"run_dir={tmp_path / name}", f"train.max_steps={steps}", processes=1, script=SCRIPT)
    assert told(tmp_path / "broken")[0] == told(tmp_path / "whole")[0]
    judged = told(tmp_path / "whole")[1][-1]
    asked = [*larger[:4], f"init={tmp_path / 'whole'}", "train.micro_batch=16", "eval_only=true"]
    printed = tasks(*asked, processes=1, script=SCRIPT)
    found = json.loads(printed.splitlines()[-1])
    assert {name: found[name] for name in ("top1", "loss")} == {name: judged[name] for name in ("top1", "loss")}


@pytest.mark.slow
def test_a_run_whose_only_checkpoint_is_damaged_begins_with_init_again(larger: list[str], tmp_path: Path) -> None:
    words = [*larger, f"run_dir={tmp_path}", "train.max_steps=1"]
    tasks(*words, processes=1, script=SCRIPT)
    (first,), _ = told(tmp_path)
    file = next((tmp_path / "checkpoints").glob("step_*/*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is set aside" in tasks(*words, processes=1, script=SCRIPT)
    assert told(tmp_path)[0] == [first]


@pytest.mark.slow
def test_a_run_that_starts_anew_from_its_weights_leaves_init_alone(larger: list[str], tmp_path: Path) -> None:
    words = [*larger, f"run_dir={tmp_path}", "train.max_steps=2"]
    tasks(*words, processes=1, script=SCRIPT)
    tasks(*words, "optim.base_lr=1e-30", "optim.min_lr=0", "resume=weights", processes=1, script=SCRIPT)
    earlier, anew = (
        read_saved(folder / "checkpoints" / "step_00000002").masters for folder in (tmp_path / "earlier_1", tmp_path)
    )
    assert all(torch.equal(anew[name].contiguous(), master.contiguous()) for name, master in earlier.items())


@pytest.mark.slow
def test_a_stop_after_the_last_step_leaves_its_judging_to_the_next_start(
    straight: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(STEPS))
    tasks(*options, f"run_dir={tmp_path}", script="tests/asked.py", code=85)
    assert len(told(tmp_path)[1]) == len(told(straight)[1]) - 1 and not (tmp_path / "timm").exists()
    tasks(*options, f"run_dir={tmp_path}", script=SCRIPT)
    assert told(tmp_path) == told(straight) and (tmp_path / "timm" / "config.json").exists()


def test_a_run_killed_before_it_was_judged_is_judged_at_the_next_start(
    straight: Path, options: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    gone = json.loads(lines[0]) | {"step": 1, "top1": 1.0}  # the best of all, whose checkpoint is there no more
    (run_dir / "evaluations.jsonl").write_text(json.dumps(gone) + "\n" + lines[0] + "\n")
    (run_dir / "checkpoints" / "best").unlink()
    for processes in (2, 1):  # of which the second finds it judged
        printed = tasks(*options, f"run_dir={run_dir}", processes=processes, script=SCRIPT)
        steps, (first, *judged) = told(run_dir)
        assert "nothing is left to do" in printed and (steps, judged) == told(straight) and first["step"] == 1
    assert (run_dir / "checkpoints" / "best").read_text() == (straight / "checkpoints" / "best").read_text()


@pytest.mark.slow
def test_one_process_under_zero2_computes_the_same(straight: Path, options: list[str], tmp_path: Path) -> None:
    tasks(*options, f"run_dir={tmp_path}", "ds=zero2", "augment.workers=2", processes=1, script=SCRIPT)
    for (_, *numbers), (_, *expected) in zip(told(tmp_path)[0], told(straight)[0], strict=True):
        assert numbers == pytest.approx(expected, rel=1e-4)  # sums in another order, over all steps
    assert [row["images"] for row in told(tmp_path)[1]] == [73, 73]


def test_an_export_that_fails_keeps_the_one_there_and_is_no_mistake(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)

    def refuse(*arguments: object) -> None:
        raise ValueError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(finetune, "export_run", refuse)
        with pytest.raises(RunFailed, match=r"not exported to .*timm \(the disk is full\); the same command tries it"):
            finetune._export(run_dir)
    kept = (run_dir / "timm" / "config.json").stat().st_mtime_ns
    finetune._export(run_dir)
    assert (run_dir / "timm" / "config.json").stat().st_mtime_ns > kept
    assert not (run_dir / "timm.new").exists()
    card = (run_dir / "timm" / "README.md").read_text()
    assert "# Model card for timm\n" in card and '"local-dir:timm"' in card, "what it was written as is no name of it"
