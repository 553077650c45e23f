"""torch.compile of blocks: every one of them, by few graphs. What code is made of the graphs is left out here."""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mixmim_ds.models import Classifier, MixMIM
from mixmim_ds.models.blocks import drop_path


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs(model: MixMIM | Classifier, *inputs: Tensor) -> int:
    """How many there are after three steps; fails if a block was left out, or had its graph broken."""
    model.train()
    for block in model.blocks():
        block.compile(backend="eager", dynamic=False)
    for _ in range(3):
        model(*inputs)[0].backward()
    assert counters["frames"]["ok"] == counters["frames"]["total"] and not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("selective", [False, True])
def test_blocks_of_all_rates_share_graphs(selective: bool) -> None:
    model = Classifier("mixmim_tiny", 64, 3)
    deep = {"depths": (1, 1, 10, 1), "drop_path_rate": 0.3}
    model.encoder = timm.create_model("mixmim_tiny", img_size=64, num_classes=3, **deep)
    model.set_grad_checkpointing(selective, selective)
    # one a stage, whose width is its own, and one for the first block, which has no drop path
    assert graphs(model, torch.randn(2, 3, 64, 64), torch.eye(3)[:2]) <= 5


def test_pretraining_compiles_every_block() -> None:
    model = MixMIM("mixmim_tiny", 64, decoder_dim=64, decoder_depth=10, decoder_num_heads=2)
    # one a stage, one for the decoder and one for its last block, which leaves half of the tokens out
    assert graphs(model, torch.randn(2, 3, 64, 64), torch.tensor([[True, False], [False, True]])) <= 6


def test_drop_path_leaves_out_images_at_its_rate() -> None:
    torch.manual_seed(0)
    rate, x = torch.tensor(0.25), torch.rand(4000, 2, 2, 3) + 1
    y = drop_path(x, rate)
    left_out = (y == 0).flatten(1)
    assert torch.equal(left_out.any(1), left_out.all(1)), "an image is left out as a whole"
    assert left_out.any(1).float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    torch.testing.assert_close(y[~left_out.any(1)], x[~left_out.any(1)] / 0.75)
    assert drop_path(x.bfloat16(), rate).dtype == torch.bfloat16
