"""What is on the disk, and when; and checkpoints that cannot be written, for it is full or read-only."""

import resource
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
from launching import ROOT, command, environment, read_until, rows, start, tasks

from mixmim_ds.checkpoints import BEST, MARKER, append_whole, newest_complete
from mixmim_ds.compose import load_config
from mixmim_ds.json_lines import JsonLines, read_rows
from mixmim_ds.models import build_model
from mixmim_ds.train.checkpoint import Saver, _prune
from mixmim_ds.train.distributed import RunFailed, connected
from mixmim_ds.train.engine import build_engine

pytestmark = pytest.mark.slow

# A disk of its own for the run, in a mount namespace of the command's own. It is read from through a copy, and spoiled
# again and again, for the run itself makes room when it removes old checkpoints.
SCRIPT = """
set -e
mount -t tmpfs -o size=600m tmpfs "$DISK"
"$@" > "$OUT" 2>&1 &
run=$!
until grep -q "step 4/" "$OUT" || ! kill -0 $run; do :; done
until grep -q "cannot be saved" "$OUT" || ! kill -0 $run; do eval "$SPOIL"; done
eval "$MEND"
wait $run || code=$?
cp -r "$DISK/run" "$KEPT"
exit ${code:-0}
"""
FULL = 'head -c 1G /dev/zero >> "$DISK/filler" || true', 'rm "$DISK/filler"'
READ_ONLY = 'chmod -R a-w "$DISK/run"', 'chmod -R u+w "$DISK/run"'


def spoiled(tmp_path: Path, spoil: str, mend: str, *overrides: str) -> tuple[int, str, Path]:
    """Runs on two processes on a disk that is spoiled once step 3 is saved, and mended after a save has failed.

    Returns:
        Exit code, what was printed, and a copy of the run folder.
    """
    disk, out, kept = tmp_path / "disk", tmp_path / "out", tmp_path / "kept"
    disk.mkdir()
    names = {"DISK": str(disk), "OUT": str(out), "KEPT": str(kept), "SPOIL": spoil, "MEND": mend}
    # Permissions do not bind root, unless it gives that power away.
    weaker = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    process = command("deepspeed", *overrides, f"run_dir={disk / 'run'}")
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SCRIPT, "bash"]
    done = subprocess.run(
        [*namespace, *weaker, *process], cwd=ROOT, env=environment() | names, timeout=240, capture_output=True
    )
    return done.returncode, out.read_text(), kept


@pytest.mark.parametrize(
    ("spoil", "mend", "reason"),
    [
        pytest.param(*FULL, "No space left", id="full"),
        pytest.param(*READ_ONLY, "Permission denied", id="read-only", marks=pytest.mark.exhaustive),
    ],
)
def test_a_disk_that_comes_back_costs_nothing(
    spoil: str, mend: str, reason: str, small_run: list[str], tmp_path: Path
) -> None:
    options = [*small_run, "train.max_steps=20", "train.save_every=1", "train.max_failed_saves=20"]
    code, printed, kept = spoiled(tmp_path, spoil, mend, *options)
    assert code == 0, printed
    told = next(line for line in printed.splitlines() if "cannot be saved" in line)
    assert reason in told and "the run goes on and tries again" in told, printed
    assert [row["step"] for row in rows(kept)] == list(range(1, 21))
    assert sum(row["save_time_s"] for row in rows(kept)) > 0
    newest = newest_complete(kept)
    assert newest is not None and newest.step == 20
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == [
        "latest",
        "step_00000019",
        "step_00000020",
    ]


def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(small_run: list[str], tmp_path: Path) -> None:
    options = [*small_run, "train.max_steps=1000", "train.save_every=1", "train.max_failed_saves=2"]
    code, printed, kept = spoiled(tmp_path, FULL[0], ":", *options)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, printed
    newest = newest_complete(kept)
    assert newest is not None and newest.step >= 3
    assert f"the newest is that of step {newest.step}, failed tries: 2." in errors[0]
    assert not list((kept / "checkpoints").glob("*.tmp")), "room is made"


def test_only_failures_in_a_row_end_a_run(tmp_path: Path) -> None:
    config = load_config(["model=tiny", "data=synthetic", f"run_dir={tmp_path}", "train.max_failed_saves=2"])
    in_the_way = tmp_path / "checkpoints" / "step_00000009.tmp"
    in_the_way.parent.mkdir()
    with connected(60) as world:
        engine = build_engine(config, build_model(config.model), world)
        saver = Saver(engine, config, world, 0)
        for step, fails in ((1, True), (2, False), (3, True), (4, True)):
            in_the_way.touch() if fails else in_the_way.unlink()
            with pytest.raises(RunFailed, match="step 2, failed tries: 2") if step == 4 else nullcontext():
                saver.save(step, must=False)
            assert saver.newest == (0 if step == 1 else 2)
        engine.destroy()


def test_the_keep_rules_spare_the_best(tmp_path: Path) -> None:
    for step in range(1, 8):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / MARKER).touch()
    (tmp_path / BEST).write_text("step_00000002")
    _prune(tmp_path, keep_last=2, keep_every=4)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step_*")) == [2, 4, 6, 7]


def test_a_run_whose_folder_is_moved_away_makes_no_other_in_its_place(small_run: list[str], tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = start(*small_run, f"run_dir={run}", "train.max_steps=40", "train.save_every=4", "train.picture_every=2")
    read_until(process, "step 5/")
    run.rename(moved)
    printed, _ = process.communicate(timeout=120)
    (error,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "cannot be saved ([Errno 2] No such file or directory: " in error
    assert f"{run / 'metrics.jsonl'} cannot be written (No such file or directory)" in printed
    newest = newest_complete(moved)
    assert newest is not None and f"the newest is that of step {newest.step}, failed tries: 3." in error
    assert not run.exists()


def test_a_checkpoint_is_on_the_disk_before_it_is_said_to_be(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order that survives a power cut: files of both ranks, their folder, marker, name, pointer."""
    told, folder = tmp_path / "told", tmp_path / "run" / "checkpoints"
    monkeypatch.setenv("SYNCED", str(told))
    tasks(*small_run, f"run_dir={tmp_path / 'run'}", "train.max_steps=1", script="tests/synced.py")
    events = told.read_text().splitlines()
    newest = newest_complete(tmp_path / "run")
    assert newest is not None and len(newest.files) == 3, "one of the model, and an optimizer's share of each rank"
    draft = f"{newest.path}.tmp"
    assert f"sync {folder.parent}" in events[events.index(f"name {folder.parent / 'environment.json'}") + 2 :]
    last = max(events.index(f"sync {draft}/{name}") for name in newest.files)
    steps = (f"sync {draft}", f"sync {draft}/{MARKER}.new", f"name {draft}/{MARKER}", f"name {newest.path}")
    pointer = (f"sync {folder}/latest.new", f"name {folder}/latest", f"sync {folder}")
    for step in steps + pointer:
        assert events.index(step, last + 1), step
        last = events.index(step, last + 1)


def test_rows_that_a_disk_refuses_are_written_later(tmp_path: Path) -> None:
    """Here a folder is in the way."""
    lines = JsonLines(tmp_path / "rows")
    lines.path.mkdir()
    lines.add({"step": 1})
    lines.path.rmdir()
    lines.add({"step": 2})
    lines.add({"step": 3})
    assert read_rows(lines.path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_what_is_added_to_a_file_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """The disk ends within it: a limit of the process's own, which a write stops short at."""
    path = tmp_path / "rows"
    append_whole(path, "0123456789")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_whole(path, "0123456789")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "0123456789"
    append_whole(path, "abc")
    assert path.read_text() == "0123456789abc"
