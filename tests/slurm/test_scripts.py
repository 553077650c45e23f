"""The shell scripts as text."""

import shutil
import subprocess

import pytest
from launching import ROOT

SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.s*h")),
    *sorted((ROOT / "launch").glob("*.slurm")),
    ROOT / "tests/slurm/install.sh",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(script: object) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("would look for mistakes in the shell scripts; shellcheck missing (make test installs it as root)")
    found = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
