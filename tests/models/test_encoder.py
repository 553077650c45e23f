"""The encoder as a timm model."""

import pytest
import reference
import timm
import torch

from mixmim_ds.models import Classifier

# The paper's table: parameters with a 1000-way head and the fixed position table, GMAC at the name's image size. That
# of huge at 384 was worked out by hand from huge, of which the tables alone grow.
SIZES = {
    "mixmim_base": (88_344_352, "16.3"),
    "mixmim_large": (197_396_668, "35.8"),
    "mixmim_huge": (659_262_658, "117.6"),
    "mixmim_base_384": (89_577_440, "52.5"),
    "mixmim_large_384": (199_246_300, "112.0"),
    "mixmim_huge_384": (662_653_650, "357.9"),
}
FEATURES = {64: 2, 96: 3, 128: 4, 160: 5, 192: 6, 224: 7}


@pytest.mark.parametrize("name", SIZES)
def test_size_and_work_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, gmacs = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) + model.absolute_pos_embed.numel() == parameters
    assert f"{(model.macs() + model.num_features * 1000) / 1e9:.1f}" == gmacs


@pytest.mark.parametrize("img_size", FEATURES)
def test_tiny_fits_every_multiple_of_a_cell(img_size: int) -> None:
    model = timm.create_model("mixmim_tiny", img_size=img_size, num_classes=5).eval()
    images = torch.randn(2, 3, img_size, img_size)
    side = FEATURES[img_size]
    assert model.forward_features(images).shape == (2, side, side, 256)
    assert model(images).shape == (2, 5)


def test_plain_images_equal_the_reference() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mixmim_tiny", img_size=96, num_classes=0).double().eval()
    images = torch.randn(2, 3, 96, 96).double()
    params = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    depths = tuple(len(stage.blocks) for stage in model.layers)
    windows = tuple(stage.window[0] for stage in model.layers)
    shape = reference.Shape(32, depths, (1, 2, 4, 8), windows, 1, 1)
    expected = reference.encode(params, images, shape)
    torch.testing.assert_close(model.forward_features(images), expected, rtol=0, atol=1e-10)


def test_each_rate_drops_what_it_names() -> None:
    """All of it, at a rate of 1; biases, which stay, are 0 at first."""
    tokens, images = torch.randn(2, 16, 16, 32), torch.randn(2, 3, 64, 64)

    def training(**rates: float) -> torch.nn.Module:
        return timm.create_model("mixmim_tiny", img_size=64, **rates).train()

    assert torch.equal(training(proj_drop_rate=1.0).layers[0].blocks[0](tokens), tokens), "both residuals"
    assert not training(attn_drop_rate=1.0).layers[0].blocks[0].attn(tokens).any()
    assert not training(drop_rate=1.0)(images).any()


def test_blocks_are_skipped_the_more_the_deeper_they_are() -> None:
    blocks = Classifier("mixmim_tiny", 64, 3, drop_path=0.3).blocks()
    assert [block.drop_path for block in blocks] == pytest.approx([0.05 * number for number in range(7)])
    torch.manual_seed(0)
    tokens = torch.randn(2, 16, 16, 32)
    assert torch.equal(blocks[0](tokens, skipped=torch.tensor(0.999)), tokens), "both residuals"


def test_position_table_is_the_reference_and_travels_with_the_weights() -> None:
    model = timm.create_model("mixmim_tiny", img_size=64)
    torch.testing.assert_close(model.absolute_pos_embed, reference.sincos_table(16, 16, 32).float())
    assert "absolute_pos_embed" in model.state_dict()
    assert not any("relative_position_index" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("name", "img_size", "sentence"),
    [
        ("mixmim_base", 250, "img_size=250x250 must be a multiple of 32"),
        ("mixmim_base", 256, "img_size=256x256 gives stage 1 a grid of 64x64 tokens that windows of 14 do not fit"),
        ("mixmim_tiny", 100, "multiple of 32"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused_in_one_sentence(name: str, img_size: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        timm.create_model(name, img_size=img_size)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads=3 must divide the 32 channels of its stage\.$"):
        timm.create_model("mixmim_tiny", num_heads=(3, 6, 12, 24))
