"""A home folder is ~ in all commands, also in quotes, behind which shells leave it."""

import os

import pytest
from launching import typed

COMMANDS = {
    "convert": ["launch/convert.py", "~/it", "~/out"],
    "index": ["launch/index.py", "~/it"],
    "pack": ["launch/index.py", "--pack", "~/it", "~/out"],
    "probe's source": ["launch/probe.py", "~/it", "--data", "DATA"],
    "probe's data": ["launch/probe.py", "random:tiny", "--data", "~/it"],
    "report": ["launch/report.py", "~/it"],
    "visualize": ["launch/visualize.py", "~/run", "~/it", "~/out.png"],
    "pretrain": ["launch/pretrain.py", "data.root=~/it", "run_dir=~/run"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_home_folder_is_written_out(name: str, labelled: object) -> None:
    done = typed(*(word.replace("DATA", str(labelled)) for word in COMMANDS[name]))
    assert done.returncode == 2 and f"{os.environ['HOME']}/it" in done.stderr.splitlines()[-1], done.stderr
