"""What the tests of fine-tuning share."""

import json
from pathlib import Path
from typing import Any

from launching import rows

SCRIPT = "launch/finetune.py"
STEPS = 14  # of 7 an epoch
PLAIN = ["augment.rand_augment=null", "augment.mixup=0", "augment.cutmix=0", "augment.erase=0", "model.drop_path=0"]


def told(run_dir: Path) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """What a run computed, without what it took: its steps, and its evaluations."""
    judged = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(run_dir)]
    return steps, [{name: value for name, value in row.items() if name != "eval_time_s"} for row in judged]
