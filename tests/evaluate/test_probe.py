"""Probes of frozen features: against plain arithmetic, and the command on real photographs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launching import converted, tasks, typed
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from mixmim_ds.data.index import open_index
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.evaluate import probe
from mixmim_ds.evaluate.features import Vectors, View, extract, load_encoder
from mixmim_ds.evaluate.probe import accuracy_of_classifier, accuracy_of_neighbours, fit, nearest

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def clouds(count: int, spread: float, around: float = 1.0) -> Vectors:
    """Vectors around five directions, other ones for another count; around=0: noise."""
    labels, dice = torch.arange(count) % 5, torch.Generator().manual_seed(count)
    return Vectors(around * torch.eye(5, 8)[labels] + spread * torch.randn(count, 8, generator=dice), labels)


def test_neighbours_vote_as_a_plain_loop_counts() -> None:
    train, val = clouds(300, 0.6), clouds(100, 0.6)
    right = 0
    for vector, label in zip(val.vectors.numpy(), val.labels.tolist(), strict=True):
        known = train.vectors.numpy()
        cosine = known @ vector / np.linalg.norm(known, axis=1) / np.linalg.norm(vector)
        near = np.argsort(-cosine)[:20]
        votes = [np.exp(cosine[near] / 0.07)[train.labels.numpy()[near] == k].sum() for k in range(5)]
        right += int(np.argmax(votes) == label)
    assert accuracy_of_neighbours(train, val, CPU) == right / 100 and 0.3 < right / 100 < 1


def test_known_vectors_in_parts_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = clouds(300, 0.6), clouds(100, 0.6).vectors.double()  # whose order rounding does not change
    known = Vectors(known.vectors.double(), known.labels)
    whole = nearest(known, asked, CPU)
    monkeypatch.setattr(probe, "KNOWN", 99)  # of which the last part has fewer than there are neighbours
    for parts, at_once in zip(nearest(known, asked, CPU), whole, strict=True):
        torch.testing.assert_close(parts, at_once)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: would compare its judgement with the CPU's")
def test_a_gpu_judges_alike() -> None:
    known, asked = clouds(3000, 0.6), clouds(1500, 0.6)
    theirs, ours = (nearest(known, asked.vectors, device)[0] for device in (GPU, CPU))
    torch.testing.assert_close(theirs, ours)
    for judge in (accuracy_of_neighbours, lambda *given: accuracy_of_classifier(*given)[0]):
        theirs, ours = (judge(known, asked, device) for device in (GPU, CPU))
        assert abs(theirs - ours) < 0.005, "of 1,500 images"


@pytest.mark.parametrize("at_once", [65_536, 64])
def test_the_classifier_is_at_the_minimum_of_its_loss(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "KNOWN", at_once)
    train = clouds(200, 1.0)
    weight, bias = fit(train.vectors, train.labels, 5, 1e-2)
    weight.requires_grad_(), bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(train.vectors @ weight.T + bias, train.labels)
    (loss + 1e-2 / 2 * weight.square().sum()).backward()
    # LBFGS stops where steps no longer change a loss of about one in fp32
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_classes_that_a_line_parts_are_told_and_noise_is_not() -> None:
    assert accuracy_of_classifier(clouds(200, 0.05), clouds(100, 0.05), CPU)[0] == 1
    accuracy, _ = accuracy_of_classifier(clouds(2000, 1, around=0), clouds(1000, 1, around=0), CPU)
    assert abs(accuracy - 0.2) < 0.06  # five standard deviations of a thousand guesses


def test_channels_are_standardised_by_the_training_set() -> None:
    scales = torch.tensor([1e-3] * 5 + [1e3] * 3)  # those that tell the classes are the small ones
    train, val = (Vectors(each.vectors * scales + 1, each.labels) for each in (clouds(200, 0.05), clouds(100, 0.05)))
    assert accuracy_of_classifier(train, val, CPU)[0] == 1
    alike = val.labels == 3
    assert accuracy_of_classifier(train, Vectors(val.vectors[alike], val.labels[alike]), CPU)[0] == 1, "one class alone"


def test_the_penalty_is_the_best_for_every_fifth_image_by_the_others() -> None:
    """Among channels of noise, where it matters."""
    dice = torch.Generator().manual_seed(1)

    def noisy(count: int) -> Vectors:
        told = clouds(count, 0.6)
        channels = torch.cat([told.vectors, torch.randn(count, 100, generator=dice)], 1)
        order = torch.randperm(count, generator=dice)
        return Vectors(channels[order], told.labels[order])

    train, val = noisy(200), noisy(600)

    def share_told(learn: Vectors, told: Vectors, penalty: float) -> float:
        middle, spread = learn.vectors.mean(0), learn.vectors.std(0)
        weight, bias = fit((learn.vectors - middle) / spread, learn.labels, 5, penalty)
        named = ((told.vectors - middle) / spread @ weight.T + bias).argmax(1)
        return (named == told.labels).float().mean().item()

    fifth = torch.arange(200) % 5 == 0
    held, others = (Vectors(train.vectors[part], train.labels[part]) for part in (fifth, ~fifth))
    found = {penalty: share_told(others, held, penalty) for penalty in probe.PENALTIES}
    best = max(found, key=found.__getitem__)
    accuracy, penalty = accuracy_of_classifier(train, val, CPU)
    assert penalty == best and accuracy == pytest.approx(share_told(train, val, best), abs=2.5 / 600)


@pytest.mark.parametrize("view", [View(), View(norm=False), View(stage=2)], ids=str)
def test_vectors_are_those_of_the_central_crop_in_the_order_of_the_index(
    view: View, labelled: Path, tmp_path: Path
) -> None:
    index, encoder = open_index(labelled / "val", tmp_path), load_encoder("random:tiny", 0, "source")
    encoder.set_input_size(64)
    images = Labelled(index, torch.arange(73), [])
    found = extract(encoder, view, images, CPU, threads=2, batch=32)
    vectors = found.vectors
    assert found.labels.tolist() == list(range(73))
    parts = [extract(encoder, view, images, CPU, 2, 32, rank, 4) for rank in range(4)]  # of which the last has none
    assert [len(part.labels) for part in parts] == [32, 32, 9, 0]
    assert torch.equal(torch.cat([part.vectors for part in parts]), vectors)
    assert len(vectors) == len(index) == 73, "32 do not divide 73"
    for i in (0, 40, 72):
        image = Image.open(index.path(i)).convert("RGB")
        side = round(min(image.size) * 224 / 256)
        top, left = (image.height - side) // 2, (image.width - side) // 2
        pixels = vision.resized_crop(image, top, left, side, side, [64, 64], InterpolationMode.BICUBIC)
        options = timm.data.resolve_data_config(encoder.pretrained_cfg)
        ready = vision.normalize(vision.to_tensor(pixels), options["mean"], options["std"])
        with torch.no_grad():
            tokens = encoder.embed(ready[None])
            for stage in encoder.layers[: view.stage or 4]:
                tokens = stage(tokens)
            expected = (encoder.norm(tokens) if view == View() else tokens).mean((1, 2))[0]
        # DALI's antialiased cubic is within a level or two of PIL's
        torch.testing.assert_close(vectors[i], expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_an_encoder_of_images_that_are_no_squares_is_refused(labelled: Path, tmp_path: Path) -> None:
    encoder = load_encoder("random:tiny", 0, "source")
    encoder.set_input_size((64, 96))
    images = Labelled(open_index(labelled / "val", tmp_path), torch.arange(73), [])
    with pytest.raises(ValueError, match="takes images of 64x96 pixels, .* give it another size"):
        extract(encoder, View(), images, CPU, threads=1, batch=32)


@pytest.mark.slow
def test_the_command_probes_runs_and_exports_alike(
    labelled: Path, stage_run: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = stage_run("zero1", "fp32")
    found = []
    for source in (run, converted(run, tmp_path / "export")):
        done = typed("launch/probe.py", source, "--data", labelled, "--index-dir", tmp_path, "--img-size", 64)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    ran, exported = found
    assert ran | {"source": ""} == exported | {"source": ""} and ran["val"] == 73 and ran["classes"] == 13
    assert 2 / 13 < ran["knn"] <= 1 and 2 / 13 < ran["linear"] <= 1, "crops of one photograph look alike"


@pytest.mark.slow
def test_a_run_probes_itself_as_the_command_probes_it(labelled: Path, small_run: list[str], tmp_path: Path) -> None:
    """One of the images of each set is broken."""
    run, data = tmp_path / "run", shutil.copytree(labelled, tmp_path / "data")
    broken = [sorted((data / part).glob("*/*.jpg"))[20] for part in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    options = [f"probe.data={data}", "probe.every=1", "train.max_steps=9"]
    tasks(*small_run, f"run_dir={run}", f"data.root={labelled}/train", "train.log_every=9", *options)
    judged = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in judged] == [7, 9], "225 images are 7 steps of 32"
    done = typed("launch/probe.py", run, "--data", data, "--index-dir", tmp_path, "--batch", 8)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["knn"], found["train"], found["val"]) == (judged[-1]["knn"], 224, 72), done.stderr
    for said in ((run / "train.log").read_text(), done.stderr):
        assert all(said.count(f"{path.parent.name}/{path.name} is left out") == 1 for path in broken)


MISTAKES = {
    "random:giant": "random:giant names no size",
    "nowhere": "EXPORT_OR_RUN: nowhere is no folder; give a run, one of its checkpoints or, where it is taken, an",
    "tests": "EXPORT_OR_RUN: tests is neither a run folder, which has checkpoints/, nor a complete checkpoint",
    "--img-size 100": "img_size",
    "--batch 0": "--batch 0 must be positive",
    f"--seed {2**64}": "must be a whole number from 0 to 2^63-1",
    "--stage 5": "--stage 5 must be one of 1 to 4",
    "--stage 2 --no-norm": "--no-norm has no effect with --stage 2",
    "--data TMP": "does not exist",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, labelled: Path, tmp_path: Path) -> None:
    words = mistake.replace("TMP", str(tmp_path)).split()
    source = [] if not words[0].startswith("--") else ["random:tiny"]
    done = typed("launch/probe.py", *source, "--data", labelled, *words, "--index-dir", tmp_path / "index")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and MISTAKES[mistake] in done.stderr.splitlines()[-1]
