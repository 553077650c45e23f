"""What the documents say is so: commands compose, options exist with the defaults given, links lead somewhere."""

import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from launching import ROOT

from mixmim_ds.compose import load_config, load_finetune_config
from mixmim_ds.config import RunConfig, flatten

FRONT = ROOT / "README.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "ds_configs" / "README.md"]


FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def lines() -> list[str]:
    """The lines in the documents' fenced blocks without a language, continued ones joined."""
    blocks = [block for path in DOCUMENTS for language, block in FENCED.findall(path.read_text()) if not language]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands() -> list[list[str]]:
    """The command lines in the documents, comments left out; one that two documents show counts once."""
    found = [shlex.split(line, comments=True) for line in lines() if "launch/" in line]
    return [command for i, command in enumerate(found) if command not in found[:i]]


def anchors(path: Path) -> set[str]:
    """What may stand behind the # in a link to a document's sections, as GitHub makes it of their titles."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def sections(title: str) -> list[str]:
    """The sections of all documents with this title."""
    found = [path.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0] for path in DOCUMENTS]
    return [section for section in found if section]


def overrides_of(command: list[str]) -> list[str]:
    """The run's options, which stand behind the script; a job puts its recipe and run folder before them."""
    (place,) = (i for i, word in enumerate(command) if word.startswith("launch/"))
    script = command[place]
    words = [word for word in command[place + 1 :] if word != "..."]
    if script.startswith("launch/mixmim_"):
        words = [f"+experiment={script.removeprefix('launch/').removesuffix('.slurm')}", "run_dir=runs/JOB", *words]
    return words


PRETRAINING = [command for command in commands() if any(re.match(r"launch/(pretrain|mixmim_.)\.", w) for w in command)]
FINETUNING = [command for command in commands() if any(word.startswith("launch/finetune.") for word in command)]


def test_there_are_commands_to_check() -> None:
    assert len(PRETRAINING) >= 10


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_scripts_exist(command: list[str]) -> None:
    for word in " ".join(command).split():
        if word.startswith("launch/"):
            assert (ROOT / word).exists(), word


def test_make_has_the_targets() -> None:
    named = {target for line in lines() for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("command", PRETRAINING, ids=" ".join)
def test_pretraining_commands_compose(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    needed = [] if any("data" in word for word in overrides_of(command)) else ["data.root=DIR"]
    config = load_config([*overrides_of(command), *needed])
    assert config.run_dir


@pytest.mark.parametrize("command", FINETUNING, ids=" ".join)
def test_finetuning_commands_compose(command: list[str]) -> None:
    needed = [] if any("run_dir=" in word or "eval_only" in word for word in command) else ["run_dir=runs/JOB"]
    assert load_finetune_config([*overrides_of(command), *needed]).init


OPTIONS = ["run_dir=DIR", "data.root=DIR"]


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("Options people need", lambda: load_config(OPTIONS)),
        ("Fine-tuning", lambda: load_finetune_config([*OPTIONS, "init=random"])),
    ],
)
def test_options_and_defaults_are_those_of_the_table(section: str, options: Callable[[], RunConfig]) -> None:
    defaults = flatten(asdict(options()))
    (text,) = sections(section)
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    checked = 0
    for names, values in rows:
        for name, value in zip(re.findall(r"`([^`]+)`", names), values.split(","), strict=False):
            if name not in ("model", "data", "data.root", "init"):  # groups, and an option without default
                found = defaults[name]
                said = value.strip().strip("`")
                assert said == {None: "none", False: "false"}.get(found, str(found)) or float(said) == float(found), (
                    name
                )
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
        place = document.parent / target if target else document
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"


def test_every_document_and_picture_is_linked() -> None:
    links = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    }
    front = {(ROOT / target).resolve() for target in re.findall(r"\]\((?!https?:)([^)#]+)", FRONT.read_text())}
    assert set(DOCUMENTS) - {FRONT} <= front, "the front page leads to every document"
    assert set(ROOT.glob("docs/*.png")) <= links
