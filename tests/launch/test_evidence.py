"""The evidence's own part: which jobs there are, that done ones are not repeated, and what is made of their numbers."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from launching import ROOT, typed
from PIL import Image

from mixmim_ds.compose import load_config, load_finetune_config


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "launch" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module  # where its dataclass looks up its own types
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ablations", [False, True])
def test_jobs_have_names_of_their_own_and_pretraining_ones_compose(evidence: ModuleType, ablations: bool) -> None:
    jobs = evidence.plan(Path("/out"), ablations)
    assert len({job.name for job in jobs}) == len(jobs)
    runs = {job.name: job.words for job in jobs if "launch/pretrain.py" in job.words}
    for job in jobs:
        if "launch/finetune.py" in job.words:
            config = load_finetune_config(list(job.words[job.words.index("launch/finetune.py") + 1 :]))
            _, weights, seed = job.name.split("_")
            assert config.init == ("random" if weights == "random" else f"/out/pretrained_{seed}")
            assert (config.train.seed, config.optim.layer_decay < 1) == (int(seed), weights == "pretrained")
    models = {}
    for name, words in runs.items():
        config = load_config(list(words[words.index("launch/pretrain.py") + 1 :]))
        assert Path(config.run_dir) == Path("/out") / name
        models[name] = repr((config.model, config.train.seed))
        assert config.train.epochs == (2 if ablations else 5), "an option that comes twice holds as it came last"
    assert len(set(models.values())) == len(runs) == len(evidence.ABLATIONS if ablations else evidence.SEEDS)
    assert sum(job.minutes for job in jobs) <= 60, "an hour on two cores"


def test_what_is_done_is_not_repeated_and_a_failure_is_told(
    evidence: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = f"open({str(tmp_path / 'notes')!r}, 'a').write('x')"
    good = evidence.Job("good", (sys.executable, "-c", note), 1)
    bad = evidence.Job("bad", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 1)
    with pytest.raises(SystemExit) as ended:
        evidence.work_off(tmp_path, [good, bad, good])
    assert ended.value.code == 3 and (tmp_path / "logs" / "bad.log").read_text() == "why\n"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: bad failed: {tmp_path / 'logs' / 'bad.log'}")
    evidence.work_off(tmp_path, [good])
    assert (tmp_path / "notes").read_text() == "x"
    changed = evidence.Job("good", (sys.executable, "-c", f"{note}  # other words"), 1)
    evidence.work_off(tmp_path, [changed])
    assert (tmp_path / "notes").read_text() == "xx"


def test_a_folder_that_cannot_be_made_is_one_sentence() -> None:
    done = typed("launch/evidence.py", "/proc/evidence")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: OUT_DIR: /proc/evidence cannot be")


@pytest.fixture
def finished(evidence: ModuleType, tmp_path: Path) -> Path:
    """What the jobs leave behind: everything is the better by ten points for pretraining, and a seed by one."""
    (tmp_path / "logs").mkdir()
    for place, weights in enumerate(evidence.WEIGHTS):
        for seed in evidence.SEEDS:
            knn = 0.6 + 0.1 * place + 0.01 * seed
            found = json.dumps({"knn": knn, "linear": knn + 0.05})
            (tmp_path / "logs" / f"probe_{weights}_{seed}.log").write_text(f"a warning\n{found}\n")
            (tmp_path / f"finetuned_{weights}_{seed}").mkdir()
            rows = [{"step": 16 * epoch, "epoch": epoch, "top1": knn + 0.02 * epoch} for epoch in (1, 5)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"finetuned_{weights}_{seed}" / "evaluations.jsonl").write_text(lines)
    return tmp_path


def test_the_table_has_means_spreads_and_the_gain_of_the_same_seed(evidence: ModuleType, finished: Path) -> None:
    found = {weights: evidence.measure(finished, weights) for weights in evidence.WEIGHTS}
    assert [row["fine-tuning"] for row in found["random"]] == pytest.approx([0.70, 0.71, 0.72]), (
        "of the last evaluation"
    )
    rows = evidence.gain_table(found).splitlines()[2:]
    assert rows == [
        "| nearest neighbours | 61.0 ± 1.0 | 71.0 ± 1.0 | 10.0 ± 0.0 |",
        "| linear classifier | 66.0 ± 1.0 | 76.0 ± 1.0 | 10.0 ± 0.0 |",
        "| fine-tuning | 71.0 ± 1.0 | 81.0 ± 1.0 | 10.0 ± 0.0 |",
    ]
    evidence.draw(finished, found)
    with Image.open(finished / "evidence.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, "nothing is drawn"


def test_the_ablations_stand_beside_the_spread_of_the_method(evidence: ModuleType, finished: Path) -> None:
    method = [evidence.probed(finished, f"pretrained_{seed}") for seed in evidence.SEEDS]
    rows = evidence.ablation_table({"the method": method, "no mask": [dict.fromkeys(method[0], 0.555)]}).splitlines()
    assert rows[0] == "| top-1, % | nearest neighbours | linear classifier |"
    assert rows[2:] == ["| the method | 71.0 ± 1.0 | 76.0 ± 1.0 |", "| no mask | 55.5 | 55.5 |"]
