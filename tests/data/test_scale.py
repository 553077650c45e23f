"""A hundred million images cost no more to open, to hold and to go on in than a few. `-s` shows the numbers."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment
from tars import picture, write_tar

from mixmim_ds.data import scan, storage
from mixmim_ds.data.plan import Plan, order_at
from mixmim_ds.data.shards import open_shards

IMAGES = 100_000_000
STEPS = 0, 10**7
MICRO_BATCHES = 16  # of 128 images, looked at in each of the two steps

# Run in a process of its own, which has not seen the files: a rank that opens the index and reads what it needs.
RANK = """
import json, sys, time
from pathlib import Path
from mixmim_ds.data.index import open_index
from mixmim_ds.data.plan import Plan
from mixmim_ds.data.shards import open_shards

def resident_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000

kind, root, index_dir, steps, micro_batches = json.loads(sys.argv[1])
before, began, working = resident_mb(), time.perf_counter(), time.process_time()
index = open_index(Path(root), Path(index_dir)) if kind == "folder" else open_shards(root, Path(index_dir))
report = {"images": len(index), "open_s": time.perf_counter() - began, "open_mb": resident_mb() - before}
report["open_cpu_s"] = time.process_time() - working
plan = Plan(0, index.sizes, 2048, 128, (7, 7))
grown = []
for step in steps:
    taken = []
    for k in range(micro_batches):
        began = time.perf_counter()
        batch = plan.micro_batch_at(step, k)
        taken.append(time.perf_counter() - began)
        assert (batch.windows[:, 2:] > 0).all()  # of the sizes that lie there, again and again
        index.give(batch.ids)
        grown.append(resident_mb() - before)
    report[f"step {step}, ms"] = 1000 * sorted(taken)[len(taken) // 2]
report["reading_mb"] = max(grown)
print(json.dumps(report))
"""


def sparse(folder: Path, arrays: dict[str, tuple[type, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Arrays on disk that are holes as long as nothing is written."""
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, (dtype, shape) in arrays.items()
    }


def write_folder_index(folder: Path, index_dir: Path) -> tuple[str, np.ndarray]:
    """The index of a folder of a thousand classes, as if it held that many images; its root and its sizes."""
    for name in range(1000):
        (folder / f"{name:03}").mkdir(parents=True)
    directories = np.array([b""] + [b"%03d" % name for name in range(1000)])
    place = storage.place_of(index_dir, os.fsencode(folder))
    place.mkdir(parents=True)
    shapes = {"paths": (np.uint8, (IMAGES, 48)), "sizes": (np.int32, (IMAGES, 2)), "labels": (np.int32, (IMAGES,))}
    arrays = sparse(place, shapes)
    for name, array in (("directories", directories), ("mtimes", scan.mtimes_of(os.fsencode(folder), directories))):
        np.save(place / f"{name}.npy", array)
        arrays[name] = array
    write_meta(place, arrays, classes=[f"{name:03}" for name in range(1000)])
    return str(folder), arrays["sizes"]


def write_shard_index(folder: Path, index_dir: Path) -> tuple[str, np.ndarray]:
    """The index of a thousand shards, as if they held that many images; its pattern and its sizes."""
    for number in range(1000):
        write_tar(folder / f"{number:04}.tar", {"a.jpg": picture(8, 8)} if number == 0 else {})
    pattern = f"{folder}/{{0000..0999}}.tar"
    open_shards(pattern, index_dir)
    (place,) = index_dir.iterdir()
    shapes = {"spans": (np.int64, (IMAGES, 3)), "sizes": (np.int32, (IMAGES, 2)), "labels": (np.int32, (IMAGES,))}
    names = {"names": (np.uint8, (IMAGES * 40,)), "ends": (np.int64, (IMAGES,))}
    arrays = sparse(place, shapes | names) | {"states": np.load(place / "states.npy")}
    write_meta(place, arrays)
    return pattern, arrays["sizes"]


def write_meta(place: Path, arrays: dict[str, np.ndarray], **more: object) -> None:
    path = place / "meta.json"
    meta = json.loads(path.read_text()) if path.exists() else {"version": storage.FORMAT_VERSION, "broken": []}
    path.write_text(json.dumps(meta | {"fingerprint": "", "arrays": storage._describe(arrays)} | more))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_rank_opens_and_reads_a_hundred_million_images(kind: str, tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    root, sizes = {"folder": write_folder_index, "shards": write_shard_index}[kind](tmp_path / "data", index_dir)
    plan = Plan(0, np.broadcast_to(np.array([375, 500], np.int32), (IMAGES, 2)), 2048, 128, (7, 7))
    for step in STEPS:
        for k in range(MICRO_BATCHES):
            sizes[plan.micro_batch_at(step, k).ids] = 375, 500
    sizes.flush()
    task = json.dumps([kind, root, str(index_dir), STEPS, MICRO_BATCHES])
    done = subprocess.run(
        [sys.executable, "-c", RANK, task], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    disk = sum(path.stat().st_blocks * 512 for path in index_dir.rglob("*"))
    print(f"\n{kind}: {json.dumps(report)}, {disk / 1e6:.0f} MB on disk")
    assert report["images"] == IMAGES
    assert report["open_cpu_s"] < 1  # whatever else the machine is doing
    assert report["open_mb"] < 200 and report["reading_mb"] < 200
    first, far = (report[f"step {step}, ms"] for step in STEPS)
    assert far < 5 * first  # the same work; other jobs on the machine make either wait
    assert disk < 100e6


def test_the_order_of_an_epoch_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        order_at(0, 5, np.arange(128) + IMAGES // 2, IMAGES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"\norder of {IMAGES:,} images, 128 of them: {peak / 1000:.0f} kB at most")
    assert peak < 100_000
