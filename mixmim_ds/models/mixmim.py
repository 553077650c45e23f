"""The MixMIM pretraining model: mix, encode, unmix, decode, reconstruct both images (arXiv 2205.13137, section 3).

Shapes: B images (even), L cells of 32 x 32 pixels, D channels of the decoder, P = 32 * 32 * 3 values of a cell.
"""

from typing import TYPE_CHECKING, cast

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mixmim_ds.models import masking
from mixmim_ds.models.encoder import init_weights
from mixmim_ds.models.grids import CELL
from mixmim_ds.models.mixmim_sizes import create_encoder
from mixmim_ds.models.recompute import recompute
from mixmim_ds.models.tables import sincos_table

if TYPE_CHECKING:
    from mixmim_ds.config import ModelConfig  # whoever takes an encoder needs no Hydra


class DecoderBlock(Block):
    """timm's ViT block, without its options, with activation checkpointing by option."""

    grad_checkpointing: bool = False
    selective: bool = False

    def residuals(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the block computes, without checkpointing; arguments as of `forward`."""
        x = x + self.attn(self.norm1(x))
        if mask is not None:
            without_masked, without_visible = x.chunk(2)
            x = masking.choose(without_masked, without_visible, mask)
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Both sequences of every image, [2B, L, D] -> [2B, L, D], or given the `mask`, of the two tokens of each place
        the one that counts, [B, L, D]."""
        if self.grad_checkpointing:
            return recompute(self.residuals, self.selective, x, mask)
        return self.residuals(x, mask)


def patchify(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, L, P]; cells in row-major order, the values of a cell ordered row, column, channel."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // CELL, CELL, width // CELL, CELL)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, CELL * CELL * channels)


def unpatchify(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, L, P] -> [B, 3, H, W] for a grid of (H/32, W/32) cells."""
    images = cells.reshape(cells.shape[0], *grid, CELL, CELL, -1)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(cells.shape[0], -1, grid[0] * CELL, grid[1] * CELL)


def normalise(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each cell to mean 0 and (unbiased) variance 1: the cells [B, L, P], their means and deviations [B, L, 1]."""
    variance, mean = torch.var_mean(cells, dim=-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (cells - mean) / deviation, mean, deviation


class MixMIM(nn.Module):
    """Encoder, decoder and loss.

    Args:
        encoder: name of a registered MixMIM encoder.
        img_size: pixels; None = the encoder's own.
        decoder_dim, decoder_depth, decoder_num_heads: of the decoder, the same for all encoders of the paper.
        norm_pix_loss: reconstruct cells normalised to mean 0 and variance 1, rather than pixels.
        group_attention: tokens attend to those of their own image only; False = to those of both, an ablation.
        dual_reconstruction: the loss counts all cells of an image; False = only those that mixed image i hides of
            image i (the mask's True), an ablation.

    Raises:
        ValueError: the encoder is none of ours or does not fit the image size.
    """

    decoder_pos_embed: Tensor

    def __init__(
        self,
        encoder: str = "mixmim_base",
        img_size: int | tuple[int, int] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
        group_attention: bool = True,
        dual_reconstruction: bool = True,
    ) -> None:
        super().__init__()
        size = {} if img_size is None else {"img_size": img_size}
        self.encoder = create_encoder(encoder, num_classes=0, **size)
        self.norm_pix_loss = norm_pix_loss
        self.group_attention = group_attention
        self.dual_reconstruction = dual_reconstruction
        height, width = to_2tuple(self.encoder.patch_embed.img_size)
        self.grid = (height // CELL, width // CELL)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_table(*self.grid, decoder_dim))
        self.decoder_embed = nn.Linear(self.encoder.num_features, decoder_dim)
        decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_dim, decoder_num_heads, qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_blocks = cast(list[DecoderBlock], decoder_blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, CELL * CELL * 3)
        for part in (self.decoder_embed, decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        trunc_normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute the blocks of encoder and decoder in the backward pass."""
        self.encoder.set_grad_checkpointing(enable, selective)
        for block in self.decoder_blocks:
            block.grad_checkpointing, block.selective = enable, selective

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, encoder first: what is compiled or wrapped one by one."""
        return [*(block for stage in self.encoder.layers for block in stage.blocks), *self.decoder_blocks]

    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features of the mixed images [B, L, 8E] -> every image's cells as predicted where masked [B, L, P]."""
        x = self.decoder_embed(tokens)
        sequences = masking.split(x, mask, self.mask_token.to(x.dtype))
        x = torch.cat(sequences) + self.decoder_pos_embed.to(x.dtype)
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        # Of the two predictions for a place only the one that did not see it counts; what follows the last attention
        # is per token, so choosing before it gives the same and halves its work.
        x = last(x, mask)
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Dual reconstruction of a micro-batch.

        Args:
            images: [B, 3, H, W], B even; float, normalised as the encoder's pretrained_cfg says.
            mask: bool [H/32, W/32], True = taken from image B-1-i.

        Returns:
            loss: float32 (or float64) scalar, mean squared error over all cells of all images (or those that
                dual_reconstruction=False leaves).
            prediction: [B, L, P], the cells of every image as reconstructed where they were masked.

        Raises:
            ValueError: B is odd (the middle image would be mixed with itself) or the mask does not fit the images.
        """
        if images.shape[0] % 2:
            raise ValueError(f"a micro-batch of {images.shape[0]} images cannot be paired; it must be even.")
        if tuple(mask.shape) != self.grid:
            raise ValueError(f"the mask is {tuple(mask.shape)}, the images have {self.grid} cells of {CELL} pixels.")
        mixed = masking.mix(images.to(self.mask_token.dtype), mask)
        tokens = self.encoder.forward_features(mixed, mask if self.group_attention else None)
        prediction = self.decode(tokens.flatten(1, 2), mask)
        exact = torch.promote_types(images.dtype, torch.float32)
        target = patchify(images.to(exact))
        if self.norm_pix_loss:
            target = normalise(target)[0]
        error = (prediction.to(exact) - target).square()
        return (error if self.dual_reconstruction else error[:, mask.flatten()]).mean(), prediction

    def flops_per_image(self) -> int:
        """Floating-point operations (2 per multiply-accumulate) of one image's forward pass, as the method states it:
        full windows, two decoder sequences per image. A training step takes three times that."""
        cells, dim = self.grid[0] * self.grid[1], self.decoder_embed.out_features
        block = 12 * dim * dim + 2 * cells * dim
        sequence = cells * (len(self.decoder_blocks) * block + dim * self.decoder_pred.out_features)
        return 2 * (self.encoder.macs() + cells * self.encoder.num_features * dim + 2 * sequence)


def build_model(options: "ModelConfig") -> MixMIM:
    """The model that a run's options describe, with random weights.

    Raises:
        ValueError: as `MixMIM`, or the mask would hide no cell, or all.
    """
    model = MixMIM(
        options.encoder, options.img_size, options.decoder_dim, options.decoder_depth, options.decoder_num_heads,
        options.norm_pix_loss, options.group_attention, options.dual_reconstruction,
    )  # fmt: skip
    cells = model.grid[0] * model.grid[1]
    hidden = int(cells * options.mask_ratio)
    if not 0 < hidden < cells:
        raise ValueError(
            f"model.mask_ratio={options.mask_ratio} hides {hidden} of the {cells} cells of {CELL} pixels that "
            f"model.img_size={options.img_size} has; it must hide at least one and leave at least one."
        )
    return model
