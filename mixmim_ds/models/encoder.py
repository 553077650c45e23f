"""The hierarchical MixMIM encoder as a timm model.

Shapes: B images, H x W pixels, h x w grid of tokens of a stage, C channels of a stage, E channels of the first stage.

A token only ever meets tokens of its own image: attention is kept inside one image, patch merging stays inside a cell
of the mask, everything else is per token. So on a mixed input the encoder computes exactly what it would compute on
each image's visible tokens alone.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from mixmim_ds.models.blocks import Stage
from mixmim_ds.models.grids import PATCH, Shape, Windows, stage_windows
from mixmim_ds.models.tables import POSITIONS, fit_tables, resample, sincos_table

_log = logging.getLogger(__name__)


def init_weights(module: nn.Module) -> None:
    """The authors' initialisation of a Linear; other modules keep PyTorch's. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MixMIMTransformer(nn.Module):
    """Hierarchical vision transformer with windowed attention and no shifted windows (arXiv 2205.13137, section 3.3).

    Args:
        img_size: pixels, a multiple of 32 whose grids the windows fit.
        embed_dim: E; stage s has E * 2^s channels.
        window_size: side of the windows of every stage (or of all), in tokens; 0 = adapts to any image size, as does
            None, which timm's create_model leaves out.
        depths, num_heads: of every stage.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm's Swin; the last one is below 1.

    Raises:
        ValueError: the image size does not fit cells and windows, or drop_path_rate is none.
    """

    absolute_pos_embed: Tensor
    pretrained_cfg: dict[str, Any]  # timm sets it

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: Windows = (14, 14, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must lie in 0 .. 1, 1 excluded.")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        dims = [embed_dim << stage for stage in range(len(depths))]
        self.embed_dim, self.num_features = embed_dim, dims[-1]
        self.window_size = window_size
        windows = stage_windows(to_2tuple(img_size), window_size, len(depths))

        self.patch_embed = PatchEmbed(img_size, PATCH, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC")
        self.register_buffer(POSITIONS, sincos_table(*windows[0][0], embed_dim))
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        layers = nn.ModuleList(
            Stage(
                dims[max(stage - 1, 0)], dims[stage], num_heads[stage], *windows[stage], drop_path[stage],
                mlp_ratio=mlp_ratio, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )
            for stage in range(len(depths))
        )  # fmt: skip
        self.layers = cast(list[Stage], layers)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH << stage, "module": f"layers.{stage}"} for stage, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self.head_hidden_size = self.head.num_features
        self.apply(init_weights)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Shape | None = None, window_size: Windows = None) -> None:
        """Another image size (pixels) or window size, as of a new model, for one with its weights; None = stays, as do
        its rules: windows that adapt go on adapting. Position and bias tables are interpolated, so the parameters are
        new ones: call it before an optimizer takes them. timm records the size for its exports.

        Raises:
            ValueError: the windows do not fit the image size; the model is as it was.
        """
        new_size: Shape = to_2tuple(self.patch_embed.img_size if img_size is None else img_size)
        new_windows = self.window_size if window_size is None else window_size
        shapes = stage_windows(new_size, new_windows, len(self.feature_info))
        table = resample(self.absolute_pos_embed[0], self.layers[0].grid, shapes[0][0])
        self.absolute_pos_embed = table[None]
        self.patch_embed.set_input_size(new_size)
        for stage, (grid, window) in zip(self.layers, shapes, strict=False):  # stages may have been pruned
            stage.set_grid(grid, window)
        self.window_size = new_windows
        update_model_input_size(self, new_size, window_size=new_windows)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module` does it, after `checkpoint_filter_fn` unless that was called before.

        timm hands its `checkpoint_path` straight to this method, without a model's filter. What it loads as pretrained
        comes filtered, and without the head if that is of other classes. Loading a module that holds an encoder does
        not pass here, so it stays as strict as ever.
        """
        fitted = state_dict if isinstance(state_dict, Fitted) else checkpoint_filter_fn(state_dict, self)
        return super().load_state_dict(fitted, strict, assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beyond 1-D parameters: the authors decay the position bias tables, and the fixed table is a buffer."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups; a patch merging belongs to the first block of its stage."""
        fine = [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute the blocks in the backward pass; `selective` keeps matrix products and recomputes the rest."""
        for stage in self.layers:
            for block in stage.blocks:
                block.grad_checkpointing, block.selective = enable, selective

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer, [B, num_features] -> [B, num_classes]."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer by a new one on the features there are, and the pooling if given ("" = none)."""
        own = self.patch_embed.proj.weight  # a head without classes has no tensor that tells where the model is
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, device=own.device, dtype=own.dtype
        )
        self.num_classes, self.head_hidden_size = num_classes, self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, H/4, W/4, E] with their positions."""
        x = self.patch_embed(x)
        return x + self.absolute_pos_embed.to(x.dtype).reshape(1, x.shape[1], x.shape[2], x.shape[3])

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] -> features [B, H/32, W/32, 8E].

        `mask` (bool [H/32, W/32]) says that the images are mixed: attention stays inside the cells of one value.
        """
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x, mask)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, h, w, C] -> logits [B, num_classes], or the pooled features before the last layer."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features after each stage in `indices`, as timm defines it (`norm` concerns the last stage only).

        Raises:
            ValueError: output_fmt is neither NCHW nor NHWC.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError("output_fmt='" + output_fmt + "' must be NCHW or NHWC.")  # TorchScript has no !r
        end = len(self.layers) - 1
        taken, last = feature_take_indices(len(self.layers), indices)
        ran = last if stop_early else end
        intermediates: list[Tensor] = []
        x = self.embed(x)
        for index, stage in enumerate(self.layers):
            if index <= ran:  # a slice whose end is computed is no TorchScript either
                x = stage(x)
            if index in taken:
                feature = self.norm(x) if norm and index == end else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return self.norm(x) if ran == end else x, intermediates

    @torch.jit.ignore
    def macs(self) -> int:
        """Multiply-accumulates of one image's features, as the method states it: every window as a whole."""
        total = 0
        for index, stage in enumerate(self.layers):
            tokens, window = stage.grid[0] * stage.grid[1], stage.window[0] * stage.window[1]
            total += tokens * (self.patch_embed.proj.weight[0].numel() if index == 0 else 2 * stage.dim) * stage.dim
            total += tokens * len(stage.blocks) * (12 * stage.dim + 2 * window) * stage.dim
        return total

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages, norm and head that `forward_intermediates(indices=...)` does not need."""
        taken, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken


class Fitted(dict[str, Any]):
    """A state dict as `checkpoint_filter_fn` returns it, which sees a file as a whole and is to do so once."""

    _metadata: Any = None  # the versions of modules, where nn.Module looks for them


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MixMIMTransformer, warn: bool = True) -> Fitted:
    """A checkpoint's tensors as `model` takes them: tables of another image size are interpolated, and a checkpoint
    of pretraining, which has no head at all, gets the model's own, which is told of if it has classes and `warn`. All
    else is left to strict loading.

    Raises:
        ValueError: a table is of no image size that the encoder could have had.
    """
    fitted = Fitted(fit_tables(state_dict, model.layers[0].grid, [stage.window for stage in model.layers]))
    fitted._metadata = getattr(state_dict, "_metadata", None)
    if not any(name.startswith("head.") for name in fitted):
        fitted.update({f"head.{name}": value for name, value in model.head.state_dict().items()})
        if model.num_classes and warn:
            _log.warning("The checkpoint has no head: the classifier keeps its own weights.")
    return fitted
