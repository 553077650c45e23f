"""The method as one would first write it in eager PyTorch: what `--against reference` compares the model with.

It is tests/reference.py's method with its loops made into batches, as public code of windowed masked image modelling
has it: windows are cut into the batch, logits of size N x N are held and get the position bias and an additive mask,
both sequences are decoded in full, attention is two matrix products and a softmax. Nothing in it is slowed down, and
its parameters are those of `MixMIM`, so that one's weights load into the other.

Shapes: B images, h x w tokens of a grid, C channels, G windows, N tokens of a window, K heads of D channels, L cells.
"""

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.models.swin_transformer import window_reverse
from torch import Tensor, nn

from mixmim_ds.models import MixMIM
from mixmim_ds.models.grids import CELL
from mixmim_ds.models.masking import upsample
from mixmim_ds.models.mixmim import normalise, patchify

Size = tuple[int, int]


class PlainMlp(nn.Module):
    """[..., C] -> [..., C] through 4C channels; timm's also calls three modules that do nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainAttention(nn.Module):
    """Eager attention [B, N, C] -> [B, N, C]; a window gives it a table of position biases."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: Size | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.biased = window is not None
        if window is not None:
            table = torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), heads)
            self.relative_position_bias_table = nn.Parameter(table)
            self.register_buffer("relative_position_index", gen_relative_position_index(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask [G, N, N] is added to the logits; x holds the G windows of each image one after another."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.biased:
            bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
            logits = logits + bias.reshape(tokens, tokens, self.heads).permute(2, 0, 1)
        if mask is not None:
            by_window = logits.reshape(-1, len(mask), self.heads, tokens, tokens)
            logits = (by_window + mask[:, None]).reshape(batch, self.heads, tokens, tokens)
        x = logits.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


def cut(x: Tensor, window: Size) -> Tensor:
    """[B, h, w, C] -> [B * G, N, C]; the window_partition of timm would need one view more."""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], dim)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], dim)


class PlainBlock(nn.Module):
    """Pre-norm block of the encoder on a grid [B, h, w, C], or of the decoder on a sequence [B, L, C]."""

    def __init__(self, dim: int, heads: int, window: Size | None = None) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = PlainAttention(dim, heads, window), PlainMlp(dim)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mask [H/32, W/32] becomes -inf where two tokens of a window stem from two images."""
        if self.window is None or mask is None:
            return self.attn(x)
        height, width = x.shape[1:3]
        group = cut(upsample(mask, height, width).to(x.dtype)[None, :, :, None], self.window)
        apart = (group != group.transpose(1, 2)).to(x.dtype)
        additive = apart.masked_fill(apart != 0, float("-inf"))
        return window_reverse(self.attn(cut(x, self.window), additive), self.window, height, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PlainMerging(nn.Module):
    """[B, h, w, C] -> [B, h/2, w/2, 2C]; the four neighbours column by column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        neighbours = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class PlainStage(nn.Module):
    """Merging, but for the first stage, and blocks."""

    def __init__(self, dim: int, heads: int, window: Size, depth: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else PlainMerging(dim // 2)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, window) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class PlainEncoder(nn.Module):
    """Tokens of mixed images to features; sizes are those of `model`."""

    absolute_pos_embed: Tensor

    def __init__(self, model: MixMIM) -> None:
        super().__init__()
        dim = model.encoder.embed_dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 4, stride=4), "norm": nn.LayerNorm(dim)})
        self.register_buffer("absolute_pos_embed", model.encoder.absolute_pos_embed.detach().clone())
        self.layers = nn.ModuleList(
            PlainStage(stage.dim, stage.blocks[0].attn.num_heads, stage.window, len(stage.blocks), number == 0)
            for number, stage in enumerate(model.encoder.layers)
        )
        self.norm = nn.LayerNorm(model.encoder.num_features)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features of the mixed images [B, L, 8E]."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](images).permute(0, 2, 3, 1))
        x = torch.where(upsample(mask, x.shape[1], x.shape[2])[:, :, None], x.flip(0), x)
        x = x + self.absolute_pos_embed.reshape(1, *x.shape[1:])
        for stage in self.layers:
            x = stage(x, mask)
        return self.norm(x).flatten(1, 2)


class PlainMixMIM(nn.Module):
    """The pretraining model, with the weights of `model`."""

    decoder_pos_embed: Tensor

    def __init__(self, model: MixMIM) -> None:
        super().__init__()
        dim = model.decoder_embed.out_features
        self.norm_pix_loss = model.norm_pix_loss
        self.encoder = PlainEncoder(model)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("decoder_pos_embed", model.decoder_pos_embed.detach().clone())
        self.decoder_embed = nn.Linear(model.encoder.num_features, dim)
        heads = model.decoder_blocks[0].attn.num_heads
        self.decoder_blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in model.decoder_blocks)
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(dim), nn.Linear(dim, CELL * CELL * 3)
        self.load_state_dict(model.state_dict())

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `MixMIM`: the loss, and the prediction [B, L, 3072]."""
        tokens, partner = self.decoder_embed(self.encoder(images, mask)), mask.flatten()[:, None]
        token = self.mask_token.to(tokens.dtype)
        x = torch.cat([torch.where(partner, token, tokens), torch.where(partner, tokens, token)])
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        own, other = self.decoder_pred(self.decoder_norm(x)).chunk(2)
        # Mixed image i hides image i where the mask is True, mixed image B-1-i everywhere else.
        prediction = torch.where(partner, own, other.flip(0))
        return (prediction - self.target(images)).square().mean(), prediction

    def target(self, images: Tensor) -> Tensor:
        """[B, L, 3072]: pixels of each cell, row, column, channel, normalised if so asked."""
        cells = patchify(images)
        return normalise(cells)[0] if self.norm_pix_loss else cells
