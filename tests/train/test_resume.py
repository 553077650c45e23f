"""Going on: on other numbers of processes, under other ZeRO stages, and after a checkpoint was damaged."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from launching import ROOT, numbers, tasks

from mixmim_ds import checkpoints
from mixmim_ds.checkpoints import newest_complete, read_checkpoint
from mixmim_ds.zero_files import MOMENTS, Saved, read_saved

pytestmark = pytest.mark.slow


def saved_in(folder: Path) -> Saved:
    newest = newest_complete(folder)
    assert newest is not None
    return read_saved(newest.path)


def images_of(folder: Path) -> list[list[object]]:
    """Step, micro-batch and its images, in order."""
    return sorted(json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_on_other_processes_and_stages_it_goes_on_as_if_nothing_were(
    precision: str, small_run: list[str], stage_run: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Many a tensor does not divide by two: ZeRO-3 pads those, and ZeRO-2 leaves gaps between them if it is told to."""
    zero2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    zero2["zero_optimization"]["parameter_alignment"] = True
    aligned = tmp_path / "aligned.json"
    aligned.write_text(json.dumps(zero2))
    straight, moved = stage_run("zero1", precision), tmp_path / "moved"
    options = [*small_run, f"precision={precision}", f"run_dir={moved}"]
    for steps, processes, ds in ((1, 2, aligned), (2, 1, "zero1"), (3, 4, "zero1"), (4, 2, "zero3")):
        tasks(*options, f"ds={ds}", f"train.max_steps={steps}", processes=processes, script="tests/live.py")
    assert images_of(moved) == images_of(straight)
    # Only the order in which micro-batches are summed differs: 1e-7 apart in fp32; in bf16 that flips roundings of
    # the working weights (2^-9 each, of few of them), which moved the loss by 1.5e-5.
    tolerance = 1e-6 if precision == "fp32" else 1e-4
    for row, expected in zip(numbers(moved), numbers(straight), strict=True):
        assert row[:3] == pytest.approx(expected[:3], rel=tolerance)
        assert row[3] == pytest.approx(expected[3], rel=10 * tolerance)
    found, expected_state = saved_in(moved), saved_in(straight)
    assert found.updates == expected_state.updates == 4
    for file in (moved / "checkpoints" / "step_00000004").glob("*model_states.pt"):
        assert torch.load(file, weights_only=False)["global_steps"] == 4, "by which DeepSpeed's own profiler goes"
    if precision == "fp32":
        for name, master in expected_state.masters.items():
            # Where a gradient is all rounding, Adam's step of about lr = 1e-4 has a random sign.
            torch.testing.assert_close(found.masters[name].contiguous(), master.contiguous(), rtol=0, atol=1e-3)
            for key in MOMENTS:
                moment = expected_state.moments[key][name].contiguous()
                error = (found.moments[key][name].contiguous() - moment).norm() / moment.norm()
                assert error < 1e-3, (key, name)


def test_the_loss_scale_of_fp16_is_read_back(stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A CPU does not train in fp16, so its scaler is put into files of bf16; test_gpu.py goes on from real ones."""
    newest = newest_complete(stage_run("zero2", "bf16"))
    assert newest is not None and read_saved(newest.path).loss_scaler is None
    copy = Path(shutil.copytree(newest.path, tmp_path / "copy"))
    scaler = DynamicLossScaler(2**16, 1000, 1, 2, False)
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 2**12, 70, 50
    for path in copy.glob("*optim_states.pt"):
        state = torch.load(path, weights_only=False)
        state["optimizer_state_dict"]["loss_scaler"] = scaler
        torch.save(state, path)
    found = read_saved(copy).loss_scaler
    assert found is not None and vars(found) == vars(scaler)


def test_what_is_cut_off_or_asks_for_code_is_not_read(stage_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stage_run("zero2", "bf16") / "checkpoints" / "step_00000004", tmp_path / "copy"))
    file = next(copy.glob("*rank_1*optim_states.pt"))
    state = torch.load(file, weights_only=False)
    torch.save(state | {"code": SimpleNamespace()}, file)
    with pytest.raises(ValueError, match=r"cannot be read as .*: Unsupported global: .*SimpleNamespace was") as refused:
        read_saved(copy)
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value), "no advice of PyTorch's"
    with pytest.raises(ValueError, match=f"{copy} is damaged: {file.name} is missing or not of "):
        read_checkpoint(copy)
    vectors = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    vectors[0] = vectors[0][: len(vectors[0]) // 2].clone()
    torch.save(state, file)
    with pytest.raises(ValueError, match="its tensors are shorter than its shapes say"):
        read_saved(copy)


def test_files_are_taken_in_the_order_of_their_ranks_and_not_of_their_names(
    stage_run: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Of which the first and the last of eleven are there."""
    source = stage_run("zero2", "bf16") / "checkpoints" / "step_00000004"
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    for old, new in ((1, 10), (0, 2)):
        for file in copy.glob(f"*pp_rank_{old}_*"):
            file.rename(file.with_name(file.name.replace(f"rank_{old}_", f"rank_{new}_", 1)))
    for name, master in read_saved(source).masters.items():
        assert torch.equal(read_saved(copy).masters[name].contiguous(), master.contiguous()), name


def test_damaged_checkpoints_are_named_set_aside_and_the_one_before_is_used(
    small_run: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [*small_run, f"run_dir={folder}", "train.save_every=1", "train.keep_last=5"]
    tasks(*options, "train.max_steps=5")
    expected = numbers(folder)
    saved = folder / "checkpoints"
    altered = next((saved / "step_00000005").glob("*rank_1*optim_states.pt"))  # which the second rank reads
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    next((saved / "step_00000004").glob("*rank_1*optim_states.pt")).unlink()
    (saved / "step_00000003" / "COMPLETE.json").write_text("")
    (saved / "latest").write_text("step_00000099")
    printed = tasks(*options, "train.max_steps=5")
    for step, reason in ((5, f"{altered.name} is not what was written"), (4, "is missing"), (3, "COMPLETE.json")):
        assert any(f"step_0000000{step}" in line and reason in line for line in printed.splitlines()), reason
    assert "going on from" in printed and "step 3/5" in printed and "step 2/5" not in printed
    assert numbers(folder) == expected
    names = sorted(path.name for path in saved.glob("step_*"))
    assert names == [f"step_0000000{step}" for step in (1, 2)] + [
        f"step_0000000{step}{end}" for step in (3, 4, 5) for end in ("", ".damaged")
    ]
    assert (saved / "latest").read_text() == "step_00000005"


def test_weights_start_anew_where_the_run_cannot_go_on(small_run: list[str], tmp_path: Path) -> None:
    """Beside things of the user's own, whose names are like the run's."""
    folder = tmp_path / "run"
    options = [*small_run, f"run_dir={folder}", "train.max_steps=2", "precision=fp32"]
    refused = tasks(*options, "resume=weights", processes=1, code=2)
    assert "resume=weights has no effect" in refused and not folder.exists()
    for name in ("checkpoints/upload.tmp", "earlier_thoughts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "theirs").touch()
    tasks(*options, processes=1)
    assert (folder / "checkpoints" / "upload.tmp" / "theirs").exists()
    before, weights = numbers(folder), saved_in(folder).masters
    anew = [*options, "train.global_batch=16", "resume=weights"]
    printed = tasks(*anew, processes=1)
    assert "starting anew from the weights of" in printed and [row[0] for row in numbers(folder)] == [1, 2]
    assert numbers(folder)[0][1] < 0.99 * before[0][1], "it starts where the other run had come to"
    assert numbers(folder / "earlier_1") == before
    for name, master in saved_in(folder / "earlier_1").masters.items():
        assert torch.equal(master.contiguous(), weights[name].contiguous())
    expected = numbers(folder)
    again = tasks(*anew, processes=1)
    assert "nothing is left to do" in again and numbers(folder) == expected, "the same command goes on from its own"
    for left in (["config.yaml"], ["config.yaml", "metrics.jsonl", "environment.json"]):
        killed_while_it_set_aside(folder, left)
        assert "starting anew from the weights of" in tasks(*anew, processes=1) and numbers(folder) == expected
        assert numbers(folder / "earlier_1") == before and not (folder / "earlier_2").exists()
    other = tasks(*anew, "model.decoder_dim=128", processes=1, code=2)
    assert "holds another model" in other.splitlines()[-1] and numbers(folder) == expected


def killed_while_it_set_aside(folder: Path, left: list[str]) -> None:
    """Brings a folder into the state in which these files of the other run had not been moved yet."""
    for entry in set(folder.iterdir()) - {folder / "earlier_1"}:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in left:
        (folder / "earlier_1" / name).replace(folder / name)


def test_what_a_run_at_work_removes_is_looked_for_anew(
    stage_run: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader, an export say, meets a checkpoint that the run removes after it has written the next one."""
    source = stage_run("zero2", "bf16") / "checkpoints" / "step_00000004"
    folder = tmp_path / "checkpoints"
    shutil.copytree(source, folder / source.name)
    digest = checkpoints.sha256

    def remove_first(path: Path) -> str:
        if path.parent.name == source.name:
            shutil.rmtree(path.parent)
            shutil.copytree(source, folder / "step_00000008")
        return digest(path)

    monkeypatch.setattr(checkpoints, "sha256", remove_first)
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.path.name == "step_00000008"


def test_a_file_that_cannot_be_read_is_damage(
    stage_run: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, which is imitated."""
    newest = newest_complete(stage_run("zero2", "bf16"))

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "sha256", fail)
    assert newest is not None and newest.altered() == sorted(newest.files)
