"""The encoder's sizes, as registered with timm."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from mixmim_ds.models.encoder import Fitted, MixMIMTransformer, checkpoint_filter_fn
from mixmim_ds.models.grids import CELL


def crop_of(img_size: int) -> float:
    """The share of the shorter side that evaluation looks at: 256 pixels are cut to 224, larger images taken whole."""
    return 224 / 256 if img_size <= 224 else 1.0


def create_encoder(name: str, **options: Any) -> MixMIMTransformer:
    """timm's `create_model` for the encoder that the option model.encoder names.

    Raises:
        ValueError: it is none of ours, or does not fit the image size.
    """
    known = timm.list_models("mixmim_*")
    if name not in known:
        raise ValueError(f"model.encoder={name} is no MixMIM encoder; choose one of {', '.join(known)}.")
    encoder: MixMIMTransformer = timm.create_model(name, **options)
    return encoder


def _cfg(img_size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, img_size, img_size), "pool_size": (img_size // CELL,) * 2,
        "crop_pct": crop_of(img_size), "interpolation": "bicubic", "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head.fc",
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "mixmim_tiny": _cfg(), "mixmim_base": _cfg(), "mixmim_large": _cfg(), "mixmim_huge": _cfg(),
        "mixmim_base_384": _cfg(384), "mixmim_large_384": _cfg(384), "mixmim_huge_384": _cfg(384),
    }
)  # fmt: skip

_WINDOWS_384 = (16, 16, 24, 12)


def _fit(state_dict: Mapping[str, Any], model: MixMIMTransformer, backbone: bool) -> Fitted:
    """As `checkpoint_filter_fn`; the head of a `backbone` is of no account, timm drops it once the weights are loaded.

    timm leaves out a file's head unless pretrained_cfg says that it has the model's classes, which one of our names
    does not of a file that it is given (`pretrained_cfg_overlay`): a head that fits is kept.
    """
    head = state_dict.get("head.fc.weight")
    if head is not None and len(head) == model.num_classes:
        model.pretrained_cfg["num_classes"] = model.num_classes
    return checkpoint_filter_fn(state_dict, model, warn=not backbone)


def _build(
    variant: str,
    pretrained: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> MixMIMTransformer:
    """`device`, `dtype`: where and as what the model is made, as timm's own models take them."""
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    fit = partial(_fit, backbone=bool(kwargs.get("features_only")))
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            MixMIMTransformer, variant, pretrained,
            feature_cfg=features, pretrained_filter_fn=fit, **kwargs,
        )  # fmt: skip
    return model.to(dtype=dtype)


@register_model
def mixmim_tiny(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """1.8 M parameters for tests and laptops; its windows adapt to any image size that is a multiple of 32."""
    size = {"embed_dim": 32, "depths": (1, 1, 4, 1), "num_heads": (1, 2, 4, 8), "window_size": None}
    return _build("mixmim_tiny", pretrained, **{**size, **kwargs})


@register_model
def mixmim_base(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """88 M parameters, 16.3 GMAC at 224."""
    size = {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}
    return _build("mixmim_base", pretrained, **{**size, **kwargs})


@register_model
def mixmim_large(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """197 M parameters, 35.8 GMAC at 224."""
    size = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
    return _build("mixmim_large", pretrained, **{**size, **kwargs})


@register_model
def mixmim_huge(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """659 M parameters, 117.6 GMAC at 224."""
    size = {"embed_dim": 352, "num_heads": (11, 22, 44, 88)}
    return _build("mixmim_huge", pretrained, **{**size, **kwargs})


@register_model
def mixmim_base_384(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """mixmim_base at 384 pixels: 90 M parameters, 52.5 GMAC."""
    size = {"img_size": 384, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "window_size": _WINDOWS_384}
    return _build("mixmim_base_384", pretrained, **{**size, **kwargs})


@register_model
def mixmim_large_384(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """mixmim_large at 384 pixels: 199 M parameters, 112 GMAC."""
    size = {"img_size": 384, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "window_size": _WINDOWS_384}
    return _build("mixmim_large_384", pretrained, **{**size, **kwargs})


@register_model
def mixmim_huge_384(pretrained: bool = False, **kwargs: Any) -> MixMIMTransformer:
    """mixmim_huge at 384 pixels; not in the paper."""
    size = {"img_size": 384, "embed_dim": 352, "num_heads": (11, 22, 44, 88), "window_size": _WINDOWS_384}
    return _build("mixmim_huge_384", pretrained, **{**size, **kwargs})
