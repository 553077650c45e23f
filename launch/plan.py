"""Plans a run: python launch/plan.py model=huge nodes=4 gpus_per_node=8 gpu=h100 [key=value ...] [--json]

Prints what a GPU must hold, the setting to take, and how long a step, a checkpoint and the run will take.

The planner's own words, with defaults:
  nodes=1 gpus_per_node=8 gpu=h100      gpu: a100_40, a100_80, h100, h200
  images=1281167                        of the data set
  img_s=N                               images/s of one GPU, measured; without it mfu=0.2, which base reached with
                                        compile=true activation_checkpointing=selective (BENCHMARKS.md)
  link_gbs=50 disk_gbs=2                GB/s of a node to others, for each of its GPUs; GB/s written by all
All others are options of launch/pretrain.py; run_dir and data.root need not be given.
"""

import argparse
import json
import sys
from dataclasses import asdict

from mixmim_ds.commands import exit_code
from mixmim_ds.plan_run import HEADROOM, MFU_WITH, Plan, Row, Words, parse, plan
from mixmim_ds.plan_time import Step

GIB = 2**30


def memory_table(done: Plan) -> list[str]:
    """A line per ZeRO stage and mode of checkpointing."""
    lines = [
        f"MEMORY of a GPU at {done.chosen.micro_batch} images, GiB (computed); what fits is within "
        f"{done.words.budget / GIB:.1f} ({HEADROOM:.0%} of the data sheet's memory stays free: assumed)",
        f"{'ds':7}{'checkpointing':15}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'buckets':>9}"
        f"{'activations':>13}{'peak':>8}  largest micro-batch that fits and divides",
    ]
    return lines + [_memory_line(row, done) for row in done.rows]


def _memory_line(row: Row, done: Plan) -> str:
    held = row.states
    sizes = zip((9, 11, 11, 9, 13, 8), (
        held.weights, held.gradients, held.masters + held.moments, held.buckets, row.activations, row.total,
    ), strict=True)  # fmt: skip
    taken = "  <- taken" if (row.ds, row.mode) == (done.chosen.ds, done.chosen.mode) else ""
    cells = "".join(f"{size / GIB:>{width}.2f}" for width, size in sizes)
    return f"{row.ds:7}{row.mode:15}{cells}  {row.largest or 'none'}{taken}"


def time_table(done: Plan, step: Step) -> list[str]:
    """Step, communication, checkpoint and run."""
    words, train = done.words, done.config.train
    rate = (
        f"{1 / (done.image_s or 1):.0f} img/s at mfu={words.mfu:g} (assumed, give img_s=N; base reached "
        f"{Words.mfu:g} with {MFU_WITH})"
    )
    if words.img_s:
        rate = f"{words.img_s:g} img/s (given as measured)"
    link = f"link_gbs={words.link_gbs:g} (assumed unless you measured it)"
    if step.gpus <= words.gpus_per_node:
        link = f"{words.machine.nvlink_gbs:g} GB/s (assumed: NVLink's data sheet)"
    return [
        f"rate of a GPU   {rate}",
        f"step            {step.seconds:.3f} s (computed): {step.computing_s:.3f} computing, {step.waiting_s:.3f} "
        f"waiting for the network; {step.images_per_s:,.0f} img/s over all GPUs",
        f"communication   {step.sent_gb:.2f} GB a GPU and step (computed), {step.sending_s:.3f} s at {link}; "
        f"overlap_comm, {'on' if step.overlap else 'off'} in this file, can hide {step.hideable:.0%} of it",
        f"checkpoint      {done.checkpoint / 1e9:.2f} GB (computed), {done.checkpoint_s:.1f} s at "
        f"disk_gbs={words.disk_gbs:g} (assumed unless you measured it), checksums not counted",
        f"run             {done.steps:,} steps, {hours(done.run_s or 0.0)} (computed), a checkpoint every "
        f"{train.save_every:,} steps included",
    ]


def hours(seconds: float) -> str:
    """Days and hours, or less."""
    if seconds >= 86400:
        return f"{int(seconds // 86400)} d {seconds % 86400 / 3600:.0f} h"
    return f"{seconds / 3600:.1f} h"


def scaling_table(done: Plan) -> list[str]:
    """Strong and weak scaling over nodes; efficiency against one node, or the fewest that the batch divides on."""
    head = f"{'':8}{'GPUs':>6}{'batch':>8}{'micro-batch':>13}{'s/step':>9}{'img/s':>10}  efficiency"
    lines = ["SCALING (computed from the rate and links above)", head]
    for name, steps in (("strong", done.strong), ("weak", done.weak)):
        for step in steps:
            first = steps[0].images_per_s / steps[0].gpus
            lines.append(
                f"{name:8}{step.gpus:>6}{step.global_batch:>8,}{step.micro_batch:>7} x {step.accumulation:<3}"
                f"{step.seconds:>9.3f}{step.images_per_s:>10,.0f}  {step.images_per_s / step.gpus / first:.1%}"
            )
    return lines


def describe(done: Plan) -> str:
    """The plan as people read it."""
    words, config, chosen, total = done.words, done.config, done.chosen, done.config.train.global_batch
    turns = total // chosen.micro_batch // words.gpus
    lines = [
        f"{config.model.encoder} at {config.model.img_size} pixels, {config.precision}: {done.parameters / 1e6:.1f} M "
        f"parameters, {3 * done.flops_per_image / 1e9:.1f} GFLOP an image and step (computed)",
        f"{words.nodes} nodes x {words.gpus_per_node} {words.gpu}",
        "",
        *memory_table(done),
        "",
        f"take            ds={chosen.ds} train.micro_batch={chosen.micro_batch} activation_checkpointing={chosen.mode}",
        f"batch           {chosen.micro_batch} img/GPU x {words.gpus} GPUs x {turns} accumulation = {total} img/step",
        f"as asked for    {done.note}",
    ]
    if done.step is None:
        return "\n".join(
            [*lines, f"time            not known in {config.precision} without img_s=N, measured on one GPU"]
        )
    return "\n".join([*lines, *time_table(done, done.step), "", *scaling_table(done)])


def main() -> int:
    """Reads the words and plans. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="see above; +experiment=NAME a recipe")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object on the last line")
    arguments = parser.parse_intermixed_args()
    done = plan(*parse(arguments.words))
    print(describe(done))
    if arguments.json:
        print(json.dumps(asdict(done) | {"checkpoint_s": done.checkpoint_s, "run_s": done.run_s}))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
