"""An encoder at another image size than its weights'."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from mixmim_ds.models import MixMIMTransformer
from mixmim_ds.models.tables import fit_tables, resample, table_grid

BIASES = "relative_position_bias_table"


def tiny(img_size: int | tuple[int, int], **kwargs: object) -> MixMIMTransformer:
    return timm.create_model("mixmim_tiny", img_size=img_size, num_classes=0, **kwargs).eval()


def with_random_tables(img_size: int | tuple[int, int]) -> MixMIMTransformer:
    """Biases are so small at first that a wrong interpolation would hardly show."""
    torch.manual_seed(0)
    model = tiny(img_size)
    for name, parameter in model.named_parameters():
        if BIASES in name:
            nn.init.normal_(parameter)
    return model


def save(model: MixMIMTransformer, folder: Path) -> Path:
    """As the export writes it: model.safetensors without a head, and config.json."""
    folder.mkdir(exist_ok=True)
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("head")}
    save_file(tensors, folder / "model.safetensors")
    save_config_for_hf(model, str(folder / "config.json"))
    return folder / "model.safetensors"


@pytest.mark.parametrize("new", [96, (64, 96), (224, 160)])
def test_resizing_and_every_way_of_loading_at_a_size_agree(new: int | tuple[int, int], tmp_path: Path) -> None:
    resized = with_random_tables(128)
    file = save(resized, tmp_path / "export")
    resized.set_input_size(new)
    images = torch.randn(2, 3, *resized.patch_embed.img_size)
    expected = resized.forward_features(images)
    by_file = timm.create_model("mixmim_tiny", img_size=new, checkpoint_path=str(file)).eval()
    by_folder = timm.create_model(f"local-dir:{file.parent}", pretrained=True, img_size=new).eval()
    for model in (by_file, by_folder):
        assert torch.equal(model.forward_features(images), expected)
        assert model.macs() == resized.macs() == tiny(new).macs()
        assert [s.window for s in model.layers] == [s.window for s in resized.layers]


def test_the_same_size_changes_no_bit() -> None:
    model = with_random_tables(96)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    model.set_input_size(96)
    model.set_input_size()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][1]), name
        assert value.data_ptr() == before[name][0] or name == "absolute_pos_embed"


def by_hand(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[L, C]; torch's own interpolation, channel by channel."""
    channels = [
        F.interpolate(column.reshape(1, 1, *old), new, mode="bicubic", align_corners=False).flatten()
        for column in table.T
    ]
    return torch.stack(channels, dim=1)


def test_the_stored_tables_are_interpolated_not_computed_anew() -> None:
    model = with_random_tables(64)
    model.absolute_pos_embed.copy_(torch.randn_like(model.absolute_pos_embed))
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_input_size((96, 64))
    assert model.patch_embed.img_size == (96, 64) and model.patch_embed.grid_size == (24, 16)
    positions = by_hand(stored["absolute_pos_embed"][0], (16, 16), (24, 16))
    assert torch.equal(model.absolute_pos_embed[0], positions)
    windows = [(8, 8), (8, 8), (4, 4), (2, 2)], [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert [stage.window for stage in model.layers] == windows[1] and model.layers[3].grid == (3, 2)
    old = [(grid, grid) for grid in (8, 8, 4, 2)]
    for stage, layer in enumerate(model.layers):
        name = f"layers.{stage}.blocks.0.attn.{BIASES}"
        offsets = [tuple(2 * side - 1 for side in window) for window in (old[stage], layer.window)]
        assert torch.equal(layer.blocks[0].attn.relative_position_bias_table, by_hand(stored[name], *offsets))
    assert model(torch.randn(1, 3, 96, 64)).isfinite().all()


def test_there_and_back_keeps_smooth_tables() -> None:
    model = tiny(96)
    table = model.absolute_pos_embed.clone()
    model.set_input_size(192)
    half = F.avg_pool2d(model.absolute_pos_embed[0].T.reshape(1, -1, 48, 48), 2).flatten(2)[0].T
    # The highest frequency turns by 1 radian a token, of which bicubic points lose some amplitude.
    assert (half - table[0]).abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(24, 24), (8, 72), (72, 8), (16, 40)])
def test_a_stored_table_tells_its_own_grid(grid: tuple[int, int], dtype: torch.dtype) -> None:
    model = tiny((grid[0] * 4, grid[1] * 4))
    table = model.absolute_pos_embed[0].to(dtype)
    swapped = torch.cat(table.chunk(2, dim=1)[::-1], dim=1)  # OpenMMLab's order of the halves
    coarse = resample(table.float(), grid, (grid[0] * 4, grid[1] * 2)).to(dtype)
    square = (24, 24)
    assert table_grid(table, square) == table_grid(swapped, square) == grid
    assert table_grid(coarse, square) == (grid[0] * 4, grid[1] * 2)


def test_a_file_of_as_many_tokens_in_another_shape_is_interpolated(tmp_path: Path) -> None:
    source = with_random_tables(96)
    file = save(source, tmp_path / "export")
    source.set_input_size((32, 288))
    loaded = tiny((32, 288), checkpoint_path=str(file))
    assert loaded.absolute_pos_embed.shape == tiny(96).absolute_pos_embed.shape
    assert torch.equal(loaded.absolute_pos_embed, source.absolute_pos_embed)


def test_a_shrunken_window_that_is_no_square_travels(tmp_path: Path) -> None:
    kwargs = {"window_size": (14, 14, 14, 7)}
    source = with_random_tables((32, 224))
    source.set_input_size(window_size=(14, 14, 14, 7))
    assert source.layers[0].window == (8, 14) and source.layers[3].window == (1, 7)
    file = save(source, tmp_path / "export")
    images = torch.randn(1, 3, 32, 224)
    same = tiny((32, 224), checkpoint_path=str(file), **kwargs)
    assert torch.equal(same.forward_features(images), source.forward_features(images))
    other = tiny(224, checkpoint_path=str(file), **kwargs)
    source.set_input_size(224)
    for name, value in other.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_window_beyond_the_grid_is_taken_for_a_square() -> None:
    """Of a file whose windows did not shrink; a file without positions is left to what loads it."""
    name, table = f"layers.3.blocks.0.attn.{BIASES}", torch.randn(27 * 27, 2)
    state = {"absolute_pos_embed": tiny(64).absolute_pos_embed, name: table}
    fitted = fit_tables(state, (16, 16), [(8, 8), (8, 8), (4, 4), (2, 2)])
    assert torch.equal(fitted[name], resample(table, (27, 27), (3, 3)))
    bare = {"absolute_pos_embed": torch.randn(5), name: table}
    assert fit_tables(bare, (16, 16), [(2, 2)] * 4) == bare


def test_a_file_of_no_known_shape_is_one_sentence() -> None:
    state = tiny(64).state_dict()
    with pytest.raises(ValueError, match=r"absolute_pos_embed has 250 tokens, which are no square; give"):
        fit_tables({**state, "absolute_pos_embed": torch.randn(1, 250, 32)}, (16, 16), [(8, 8)])
    name = f"layers.0.blocks.0.attn.{BIASES}"
    with pytest.raises(ValueError, match=rf"{name} has 7 rows, which are of no window; give"):
        tiny(96).load_state_dict({**state, name: torch.randn(7, 1)})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"img_size": 256}, "img_size=256x256 gives stage 1 a grid of 64x64 tokens that windows of 14 do not fit"),
        ({"img_size": (256, 224)}, "choose another img_size, of which 224x224 is the nearest that fits, or in Python"),
        ({"img_size": (32, 352)}, "a grid of 8x88 tokens that .* of which 32x448 is the nearest that fits"),
        ({"img_size": (224, 100)}, "img_size=224x100 must be a multiple of 32"),
        ({"window_size": (7, 7, 5, 7)}, "gives stage 3 a grid of 14x14 tokens that windows of 5 do not fit"),
        (
            {"window_size": (7, 7)},
            r"window_size=\(7, 7\) must be a positive number, one for each of 4 stages, or 0, which",
        ),
        ({"window_size": -7}, "window_size=-7 must be a positive number"),
        ({"window_size": (7, 7, 7, 0)}, r"window_size=\(7, 7, 7, 0\) must be a positive number"),
        ({"window_size": ((7, 7),) * 4}, r"window_size=\(\(7, 7\),.* must be a positive number, one for each"),
    ],
)
def test_a_size_that_does_not_fit_leaves_the_model_as_it_was(arguments: dict[str, object], sentence: str) -> None:
    model = timm.create_model("mixmim_base", embed_dim=16, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), num_classes=0)
    images = torch.randn(1, 3, 224, 224)
    before = model.eval()(images)
    with pytest.raises(ValueError, match=sentence):
        model.set_input_size(**arguments)
    assert torch.equal(model(images), before)
    assert model.patch_embed.img_size == (224, 224) and model.window_size == (14, 14, 14, 7)


def test_base_at_384_is_its_own_registered_size() -> None:
    """The paper's windows of 384 pixels, from weights of 224."""
    with torch.device("meta"):
        model, own = timm.create_model("mixmim_base"), timm.create_model("mixmim_base_384")
    model.set_input_size(384, (16, 16, 24, 12))
    assert model.macs() == own.macs()
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, own)]
    assert shapes[0] == shapes[1]


def test_windows_of_0_adapt_to_every_size(tmp_path: Path) -> None:
    """Of a model made so, of one that is told so later, and of what is exported and loaded again."""
    narrow = {"embed_dim": 16, "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1), "num_classes": 0}
    with pytest.raises(
        ValueError, match=r"do not fit; .* or in Python other windows or window_size=0, which adapts\.$"
    ):
        timm.create_model("mixmim_base", img_size=512, **narrow)
    made = timm.create_model("mixmim_base", img_size=512, window_size=0, **narrow)
    told = timm.create_model("mixmim_base", **narrow)
    told.set_input_size(512, 0)
    save(told, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for model in (made, told, loaded):
        assert [stage.window for stage in model.layers] == [(8, 8)] * 4
        model.set_input_size(320)
        assert [stage.window for stage in model.layers] == [(10, 10)] * 4
    tables = [model.state_dict() for model in (told, loaded)]
    assert all(torch.equal(tables[0][name], value) for name, value in tables[1].items())


def test_dtype_device_and_freezing_stay() -> None:
    model = tiny(64).bfloat16()
    model.layers[0].requires_grad_(False)
    model.set_input_size(96)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert f"layers.0.blocks.0.attn.{BIASES}" in frozen and all(name.startswith("layers.0.") for name in frozen)
    assert "relative_position_index" not in str(list(model.state_dict()))


def test_a_headless_file_loads_strictly_and_leaves_the_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_random_tables(64)
    file = save(source, tmp_path / "export")
    model = timm.create_model("mixmim_tiny", img_size=64, checkpoint_path=str(file))
    assert "no head" in caplog.text
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.get_classifier().weight.std() > 0 and not model.get_classifier().bias.any()
    state = model.state_dict()
    del state["head.fc.bias"]
    with pytest.raises(RuntimeError, match=r"head\.fc\.bias"):  # half a head is a damaged file
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict({name: value for name, value in state.items() if name != "norm.weight"})
