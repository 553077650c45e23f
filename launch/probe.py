"""What frozen features are worth: python launch/probe.py EXPORT_OR_RUN --data DIR

DIR/train and DIR/val hold a folder for each class. The last line is JSON: `knn` and `linear` are top-1, 0 to 1.
`random:tiny` (or base, large, huge) instead of the first argument gives the untrained baseline.
"""

import argparse
import json
import sys
from os.path import expanduser

import torch

import mixmim_ds  # noqa: F401  registers the encoders
from mixmim_ds.commands import exit_code, typed_path
from mixmim_ds.config import check_seed
from mixmim_ds.device import on_gpu
from mixmim_ds.finetune_config import LabelledDataConfig


def probe(arguments: argparse.Namespace) -> dict[str, object]:
    """Both accuracies and what they are of. ValueError on a user's mistake."""
    if arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch} must be positive.")
    check_seed("--seed ", arguments.seed)
    # Here, for a mistake in the words need not wait for the seconds that DALI takes.
    from mixmim_ds.data.central import tell_left_out
    from mixmim_ds.data.labelled import open_labelled
    from mixmim_ds.data.recover import DataFailed
    from mixmim_ds.evaluate.features import View, extract, load_encoder
    from mixmim_ds.evaluate.probe import accuracy_of_classifier, accuracy_of_neighbours
    from mixmim_ds.train.distributed import share_of_cores

    data = LabelledDataConfig(root=arguments.data, index_dir=str(arguments.index_dir))
    train, val = open_labelled(data, "--data")
    encoder = load_encoder(arguments.source, arguments.seed, "EXPORT_OR_RUN")
    view = View(arguments.stage, not arguments.no_norm)
    view.check(encoder)
    if arguments.img_size is not None:
        encoder.set_input_size(arguments.img_size)
    device = torch.device("cuda", 0) if on_gpu() else torch.device("cpu")
    cores, batch = share_of_cores(), arguments.batch
    try:
        known, asked = (extract(encoder, view, part, device, cores, batch) for part in (train, val))
    except DataFailed as error:
        raise SystemExit(f"error: {error}") from error
    tell_left_out(each.left_out for each in (known, asked))
    linear, penalty = accuracy_of_classifier(known, asked, device)
    return {
        "source": arguments.source, "knn": accuracy_of_neighbours(known, asked, device),
        "linear": linear, "penalty": penalty,
        "stage": arguments.stage or len(encoder.layers), "norm": view.norm, "channels": known.vectors.shape[1],
        "classes": len(train.classes), "train": len(known.labels), "val": len(asked.labels),
    }  # fmt: skip


def main() -> int:
    """Reads the command line and probes. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=expanduser, metavar="EXPORT_OR_RUN", help="an export, a run, a checkpoint, or random:SIZE"
    )
    parser.add_argument(
        "--data", type=expanduser, required=True, metavar="DIR", help="holds train/ and val/; s3://bucket/prefix too"
    )
    parser.add_argument("--img-size", type=int, help="pixels (default: the encoder's own)")
    parser.add_argument("--stage", type=int, default=0, help="1, 2, ...: whose tokens are averaged (default: the last)")
    parser.add_argument("--no-norm", action="store_true", help="without the encoder's final LayerNorm")
    parser.add_argument("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights of random:SIZE (default: %(default)s)")
    parser.add_argument(
        "--index-dir", type=typed_path, default=LabelledDataConfig.index_dir, help="default: %(default)s"
    )
    arguments = parser.parse_args()
    found = probe(arguments)
    print(
        f"{found['source']}: top-1 {found['knn']:.1%} by neighbours, {found['linear']:.1%} by a linear classifier; "
        f"{found['train']:,} images to learn from, {found['val']:,} to tell, of {found['classes']} classes"
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
