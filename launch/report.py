"""A run as one page: python launch/report.py RUN_DIR [OUT.html]

The page (by default RUN_DIR/report.html) holds curves, reconstructions, what happened and when, and needs nothing else:
send it to whoever wants to know. It can be made while the run is at work, and made again.
"""

import argparse
import sys
from pathlib import Path

from mixmim_ds.commands import exit_code, typed_path
from mixmim_ds.report.page import GENERATOR, render
from mixmim_ds.report.story import read_story


def report(run_dir: Path, out: Path) -> None:
    """Writes the page. ValueError on a user's mistake."""
    if out.exists() and (out.is_dir() or GENERATOR.encode() not in out.read_bytes()[:1000]):
        raise ValueError(f"OUT={out} exists and is no report; choose another file to write to.")
    page = render(read_story(run_dir))
    try:
        out.write_text(page, errors="backslashreplace")  # of names that are no UTF-8
    except OSError as error:
        raise ValueError(f"OUT={out} cannot be written ({error.strerror}); choose another file.") from error


def main() -> int:
    """Reads the command line and reports. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=typed_path, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument("out", type=typed_path, nargs="?", metavar="OUT", help="default: RUN_DIR/report.html")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run_dir / "report.html"
    report(arguments.run_dir, out)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
