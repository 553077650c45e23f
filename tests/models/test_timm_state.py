"""What timm reads off a model stays right after the model is changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import get_model_args, get_model_input_config, get_model_traits
from timm.models._hub import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

from mixmim_ds.models import MixMIMTransformer

SIZE = 64
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def tiny(**options: Any) -> MixMIMTransformer:
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "img_size": SIZE}
    return timm.create_model("mixmim_tiny", **{**small, **options}).eval()


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_a_pruned_model_takes_a_new_classifier(last: int, pool: str) -> None:
    model = tiny()
    model.prune_intermediate_layers([last])
    assert model.num_features == model.head_hidden_size == model.feature_info[last]["num_chs"]
    assert model.num_classes == 0 and model.global_pool == model.head.global_pool.pool_type == ""
    assert torch.equal(model(IMAGES), model.forward_features(IMAGES))
    model.reset_classifier(7, pool)
    assert model.global_pool == model.head.global_pool.pool_type == pool
    features = model.forward_features(IMAGES)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(IMAGES).shape == (2, model.num_classes) == (2, 7)
    assert model.head_hidden_size == model.num_features * (2 if pool == "catavgmax" else 1)


def test_pruning_leaves_nothing_unused_and_the_maps_as_they_were() -> None:
    model = tiny(drop_rate=0.5)
    _, maps = model.forward_intermediates(IMAGES)
    for last in range(4):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([last], prune_norm=True)
        (found,) = pruned.forward_intermediates(IMAGES, indices=taken, intermediates_only=True)
        assert torch.equal(found, maps[last])
        assert torch.equal(pruned.forward_features(IMAGES).permute(0, 3, 1, 2), maps[last])
        pruned.train().forward_features(IMAGES).sum().backward()
        assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers([3], prune_head=False)
    assert torch.equal(kept(IMAGES), model(IMAGES)) and kept.global_pool == "avg"


def test_a_new_classifier_is_where_the_model_is() -> None:
    for place in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        model = tiny(num_classes=0).to(**place)
        model.reset_classifier(3)
        weight, own = model.get_classifier().weight, model.patch_embed.proj.weight
        assert (weight.dtype, weight.device) == (own.dtype, own.device)


def test_timm_knows_the_input_after_every_change() -> None:
    model = tiny(in_chans=1)
    before = copy.deepcopy(model.pretrained_cfg)
    assert get_model_input_config(model)["input_size"] == (1, SIZE, SIZE)
    model.set_input_size((96, 64))
    assert resolve_input_data_config(model)["input_size"] == (1, 96, 64)
    model.reset_classifier(5, "max")
    assert get_model_traits(model)["img_size"] == get_model_args(model)["img_size"] == (96, 64)
    found = {key: get_model_args(model)[key] for key in ("num_classes", "global_pool", "in_chans")}
    assert found == {"num_classes": 5, "global_pool": "max", "in_chans": 1}
    assert model.pretrained_cfg == before, "what the weights were made with is no state of the model"
    other = tiny()
    assert get_model_traits(other)["img_size"] == (SIZE, SIZE)


@pytest.mark.parametrize("windows", [None, 1, [4, 4, 2, 1]])
def test_a_resized_model_comes_back_as_it_was(windows: Any, tmp_path: Path) -> None:
    model = tiny()
    for name, parameter in model.named_parameters():
        if "bias_table" in name:
            nn.init.normal_(parameter)  # at first they are too small for a wrong window to show
    model.set_input_size((96, 64), windows)
    model.reset_classifier(5, "max")
    save_for_hf(model, tmp_path)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 96, 64)
    assert torch.equal(back(images), model(images))
    assert [stage.window for stage in back.layers] == [stage.window for stage in model.layers]
    assert back.state_dict().keys() == model.state_dict().keys()


def test_no_image_size_is_taken_for_none() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="img_size=0x0 must be a multiple of 32"):
        model.set_input_size(0)


def test_a_model_is_made_where_and_as_asked() -> None:
    hidden = tiny(device="meta", dtype=torch.bfloat16)
    assert {value.device.type for value in hidden.state_dict().values()} == {"meta"}
    assert {value.dtype for value in hidden.state_dict().values()} == {torch.bfloat16}
    backbone = tiny(device="meta", features_only=True)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert not {"device", "dtype"} & get_model_args(hidden).keys()


def test_a_model_from_the_meta_device_gets_its_indices_back() -> None:
    model = tiny()
    empty = tiny(device="meta").to_empty(device="cpu").eval()
    for buffer in empty.buffers():
        buffer.fill_(0)  # memory may happen to hold the right numbers
    empty.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(empty)
    assert torch.equal(empty(IMAGES), model(IMAGES))


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_that_a_model_on_the_meta_device_is_assigned_are_all_it_needs(wrapped: bool) -> None:
    """Of a module that holds an encoder, too."""
    model, hidden = tiny(), tiny(device="meta")
    if wrapped:
        nn.Sequential(hidden).load_state_dict(nn.Sequential(model).state_dict(), assign=True)
    else:
        hidden.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(hidden(IMAGES), model(IMAGES))
