"""Imports point one way."""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import mixmim_ds

PACKAGE = Path(mixmim_ds.__file__).parent


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_two_rooms_import_each_other() -> None:
    """A room is a folder of the package, or a file beside them."""
    rooms: dict[str, set[str]] = defaultdict(set)
    names = {path.stem for path in PACKAGE.iterdir()}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        parts = [module.split(".") for module in imported(path) if module.startswith("mixmim_ds.")]
        rooms[room] |= {part[1] for part in parts if part[1] in names} - {room}
    assert {"models", "train"} <= rooms["benchmark"], "imports are seen"
    graphlib.TopologicalSorter(rooms).prepare()  # a CycleError names the rooms


def test_models_know_nothing_of_how_they_are_trained() -> None:
    strangers = ("deepspeed", "torch.distributed", "mixmim_ds.train", "mixmim_ds.data")
    for path in (PACKAGE / "models").glob("*.py"):
        assert not [module for module in imported(path) if module.startswith(strangers)]
