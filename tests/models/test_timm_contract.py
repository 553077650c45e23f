"""What timm promises of its models holds for every registered name; the sizes keep their widths where that is cheap."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import apply_test_time_pool
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor

import mixmim_ds  # noqa: F401  registers the encoders

NAMES = timm.list_models("mixmim_*")
NARROW = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


def small(name: str, **options: Any) -> torch.nn.Module:
    """The registered model at its image size and windows, but narrow and shallow."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**NARROW, **options}).eval()


def images_for(model: torch.nn.Module, channels: int = 3) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_name_is_there() -> None:
    assert set(NAMES) == {
        f"mixmim_{size}" for size in ("tiny", "base", "large", "huge", "base_384", "large_384", "huge_384")
    }
    assert set(timm.list_models(module="mixmim_sizes")) == set(NAMES)


def test_config_says_what_the_model_is(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, *model.patch_embed.img_size) and config["fixed_input_size"]
    assert config["pool_size"] == model.layers[-1].grid
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_submodule(config["first_conv"]).weight.shape[1] == 3
    assert config["num_classes"] == model.num_classes == model.get_classifier().out_features == 1000
    assert [info["num_chs"] for info in model.feature_info] == [model.embed_dim << stage for stage in range(4)]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert config["crop_pct"] == (0.875 if config["input_size"][1] == 224 else 1.0)
    assert not model.no_weight_decay(), "the authors decay the position bias tables, too"
    assert apply_test_time_pool(model, config)[1] is False
    with pytest.raises(TypeError, match="no_option"):
        timm.create_model(name, device="meta", no_option=1)


def test_features_head_and_classifier(name: str) -> None:
    model = small(name, num_classes=7)
    with torch.no_grad():
        features = model.forward_features(images_for(model))
        assert features.shape == (1, *model.layers[-1].grid, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(pooled, features.mean((1, 2)))
        assert torch.equal(model.get_classifier()(pooled), model(images_for(model)))
        for pool, expected in (("max", features.amax((1, 2))), ("avg", features.mean((1, 2)))):
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(images_for(model)), expected)
        model.reset_classifier(0, "")
        assert torch.equal(model(images_for(model)), features) and model.global_pool == ""
        model.reset_classifier(5, "catavgmax")
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert model.head_hidden_size == 2 * model.num_features and model(images_for(model)).shape == (1, 5)
        model.reset_classifier(5, "avg")
        assert model(images_for(model)).shape == (1, 5) and model.num_classes == 5


@pytest.mark.parametrize("taken", [(0,), (1, 3), (0, 1, 2, 3)])
def test_feature_maps_are_the_stages(name: str, taken: tuple[int, ...]) -> None:
    backbone = small(name, features_only=True, out_indices=taken)
    whole = small(name)
    images = images_for(whole)
    with torch.no_grad():
        maps = backbone(images)
        _, stages = whole.forward_intermediates(images)
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    assert [images.shape[-1] // m.shape[-1] for m in maps] == backbone.feature_info.reduction()
    for found, index in zip(maps, taken, strict=True):
        assert torch.equal(found, stages[index])


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor")
def test_feature_maps_can_be_scripted_and_exported(name: str) -> None:
    backbone = small(name, features_only=True, out_indices=(0, 2))
    images = images_for(backbone.model)
    with torch.no_grad():
        expected = backbone(images)
        for form in (torch.jit.script(backbone), torch.export.export(backbone, (images,)).module()):
            torch.testing.assert_close(list(form(images)), expected)


def test_intermediates_in_every_form(name: str) -> None:
    model = small(name)
    images = images_for(model)
    with torch.no_grad():
        features, maps = model.forward_intermediates(images, norm=True, output_fmt="NHWC")
        assert torch.equal(features, model.forward_features(images)) and torch.equal(maps[-1], features)
        planes = model.forward_intermediates(images, indices=2, intermediates_only=True)
        assert [m.shape[1] for m in planes] == [model.feature_info[stage]["num_chs"] for stage in (2, 3)]
        end, (early,) = model.forward_intermediates(images, indices=[1], stop_early=True, norm=True)
        assert torch.equal(early, maps[1].permute(0, 3, 1, 2)) and torch.equal(end, maps[1])
        with pytest.raises(ValueError, match="output_fmt='NLC' must be NCHW or NHWC"):
            model.forward_intermediates(images, output_fmt="NLC")
        assert model.prune_intermediate_layers([1]) == [1]
        assert len(model.layers) == 2 and model.num_features == model.feature_info[1]["num_chs"]
        assert torch.equal(model.forward_features(images), maps[1])
        model.reset_classifier(5, "avg")
        assert model(images).shape == (1, 5)


def test_layers_are_grouped_from_stem_to_norm(name: str) -> None:
    model = small(name)
    parameters = {key for key, _ in model.named_parameters()}
    for coarse, blocks in ((False, 5), (True, 4)):
        found = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(found) == parameters
        assert found["patch_embed.proj.weight"] == 0 and found["head.fc.weight"] == max(found.values()) == blocks + 1
        assert found["layers.3.blocks.0.norm1.weight"] == blocks
        assert found["norm.weight"] == (blocks + 1 if coarse else blocks)
        assert found["layers.1.downsample.norm.weight"] == found["layers.1.blocks.0.norm1.weight"]
    scales = [group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert min(scales) < 0.1 and max(scales) == 1


def test_checkpointing_and_dropping_in_training(name: str) -> None:
    model = small(name, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2, num_classes=3)
    images = images_for(model).expand(2, -1, -1, -1)
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(
            plain, recomputed, rtol=1e-4, atol=1e-6
        )  # threads scatter the bias tables' in any order
    torch.manual_seed(2)
    assert not torch.equal(model(images)[0], model(images)[1]), "each image is dropped from on its own"
    model.eval()
    assert torch.equal(model(images)[0], model(images)[0])


def test_other_channels_take_over_the_weights(name: str, tmp_path: Path) -> None:
    grey, colour = small(name, in_chans=1, num_classes=0), small(name, num_classes=0)
    assert grey(images_for(grey, 1)).shape == (1, grey.num_features)
    torch.save(colour.state_dict(), tmp_path / "colour.pt")
    overlay = {"file": str(tmp_path / "colour.pt")}
    adapted = small(name, in_chans=1, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay)
    expected = colour.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(adapted.patch_embed.proj.weight, expected)


def test_bf16_stays_bf16(name: str) -> None:
    model = small(name, num_classes=3)
    exact = model(images_for(model))
    rough = model.bfloat16()(images_for(model).bfloat16())
    assert rough.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; logits of a fresh head are of order 1.
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.1)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor")
def test_it_can_be_exported_scripted_and_traced(name: str) -> None:
    model = small(name, num_classes=3)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)
        torch.testing.assert_close(torch.jit.trace(model, images)(images), expected)
        torch.testing.assert_close(torch.jit.script(model)(images), expected)
        extractor = create_feature_extractor(model, {"layers.1": "second", "norm": "last"})
        found = extractor(images)
        assert torch.equal(found["last"], model.forward_features(images))
        _, maps = model.forward_intermediates(images, output_fmt="NHWC")
        assert torch.equal(found["second"], maps[1])
