"""The method, written down literally: slow, explicit, and independent of the package it judges.

Tests and benchmarks compare the real model with this file, so it shares no code with `mixmim_ds` and takes no
short cut: one image, window and head at a time, attention at full size, both sequences decoded in full.
It runs in whatever precision the parameters and images have, and is differentiable.

B     images of the micro-batch (even)     E     width of the first stage; stage s has C = E * 2**s
H, W  pixels of an image                   D     width of the decoder
h, w  tokens of the grid at hand           L     mask cells of an image, (H/32) * (W/32)
C     channels at hand                     N     tokens that meet in attention: a window, or L

A mask is bool [H/32, W/32], one for the micro-batch. True: in mixed image i this cell is from image B-1-i.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]

PATCH = 4  # pixels along the side of a token of the first stage
CELL = 32  # pixels along the side of a mask cell, which is also a token of the last stage
LAYER_NORM_EPS = 1e-5
TARGET_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes that parameters alone do not tell. `window_sizes` may exceed the grid, they shrink to it."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_sizes: tuple[int, ...]
    decoder_depth: int
    decoder_num_heads: int
    norm_pix_loss: bool = True


def forward(params: Params, images: Tensor, mask: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and prediction [B, L, 3072] of images [B, 3, H, W] under mask [H/32, W/32].

    The prediction of an image at a place comes from the mixed image in which the place was hidden.
    """
    if len(images) % 2:
        raise ValueError(f"{len(images)} images: the middle one would be mixed with itself")
    mixed = mix(embed_patches(params, images), mask)
    own, partner = decode(params, run_stages(params, mixed, shape, mask), mask, shape)
    # Mixed image i hides image i where the mask is True; mixed image B-1-i hides image i everywhere else.
    hidden, last = mask.flatten()[:, None], len(images) - 1
    prediction = torch.stack([torch.where(hidden, own[i], partner[last - i]) for i in range(len(images))])
    loss = (prediction - targets(images, shape.norm_pix_loss)).square().mean()
    return loss, prediction


def encode(params: Params, images: Tensor, shape: Shape, mask: Tensor | None = None) -> Tensor:
    """Features [B, H/32, W/32, 8E] of images [B, 3, H, W], after the final LayerNorm.

    Nothing is mixed here. A mask means that the images are mixed already, and keeps the two groups apart.
    """
    return run_stages(params, embed_patches(params, images), shape, mask)


def embed_patches(params: Params, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] to tokens [B, H/4, W/4, E], not yet knowing where they are."""
    if images.shape[-2] % CELL or images.shape[-1] % CELL:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are not whole cells of {CELL}")
    weight, bias = params["encoder.patch_embed.proj.weight"], params["encoder.patch_embed.proj.bias"]
    tokens = F.conv2d(images, weight, bias, stride=PATCH).permute(0, 2, 3, 1)
    return layer_norm(params, "encoder.patch_embed.norm", tokens)


def mix(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens [B, h, w, C]: entry i is image i where the mask is False, image B-1-i where it is True."""
    taken = on_grid(mask, tokens.shape[1], tokens.shape[2])[:, :, None]
    last = len(tokens) - 1
    return torch.stack([torch.where(taken, tokens[last - i], tokens[i]) for i in range(len(tokens))])


def on_grid(mask: Tensor, height: int, width: int) -> Tensor:
    """Mask [H/32, W/32] to [h, w]: every cell repeated over the tokens that it covers."""
    per_row, per_column = height // mask.shape[0], width // mask.shape[1]
    return mask.repeat_interleave(per_row, dim=0).repeat_interleave(per_column, dim=1)


def run_stages(params: Params, tokens: Tensor, shape: Shape, mask: Tensor | None) -> Tensor:
    """Tokens [B, H/4, W/4, E] to features [B, H/32, W/32, 8E], one image at a time."""
    position = params["encoder.absolute_pos_embed"].reshape(tokens.shape[1:])
    features = []
    for x in tokens:
        x = x + position
        for s, depth in enumerate(shape.depths):
            if s > 0:
                x = merge_patches(params, f"encoder.layers.{s}.downsample", x)
            for b in range(depth):
                name = f"encoder.layers.{s}.blocks.{b}"
                x = encoder_block(params, name, x, shape.num_heads[s], shape.window_sizes[s], mask)
        features.append(layer_norm(params, "encoder.norm", x))
    return torch.stack(features)


def merge_patches(params: Params, name: str, x: Tensor) -> Tensor:
    """Tokens [h, w, C] to [h/2, w/2, 2C]."""
    # Down before right: the channel order of Swin's first release, which published weights are stored in.
    neighbours = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
    merged = layer_norm(params, f"{name}.norm", torch.cat(neighbours, dim=-1))
    return F.linear(merged, params[f"{name}.reduction.weight"])


def encoder_block(params: Params, name: str, x: Tensor, heads: int, window: int, mask: Tensor | None) -> Tensor:
    """Pre-norm block over the grid [h, w, C] of one image: attention in every window, then the MLP."""
    height, width, channels = x.shape
    window = min(window, height, width)
    if height % window or width % window:
        raise ValueError(f"windows of {window} do not tile a grid of {height} x {width}")
    groups = x.new_zeros(height, width) if mask is None else on_grid(mask, height, width)
    table = params[f"{name}.attn.relative_position_bias_table"]
    bias = table[relative_position_index(window).to(table.device)].permute(2, 0, 1)

    normed, rows = layer_norm(params, f"{name}.norm1", x), []
    for top in range(0, height, window):
        row = []
        for left in range(0, width, window):
            tokens = normed[top : top + window, left : left + window].reshape(-1, channels)
            group = groups[top : top + window, left : left + window].flatten()
            own_group_bias = bias.masked_fill(group[:, None] != group[None, :], -math.inf)
            attended = attention(params, f"{name}.attn", tokens, heads, own_group_bias)
            row.append(attended.reshape(window, window, channels))
        rows.append(torch.cat(row, dim=1))
    x = x + torch.cat(rows, dim=0)
    return x + mlp(params, f"{name}.mlp", layer_norm(params, f"{name}.norm2", x))


@functools.cache
def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for (query i, key j) of a window, [N, N]."""
    places = [(row, column) for row in range(window) for column in range(window)]
    reach, size = window - 1, 2 * window - 1
    return torch.tensor([[(ri - rj + reach) * size + (ci - cj + reach) for rj, cj in places] for ri, ci in places])


def attention(params: Params, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Self-attention of tokens [N, C]; a bias [heads, N, N] is -inf where two tokens must not meet."""
    head_dim = x.shape[1] // heads
    queries, keys, values = linear(params, f"{name}.qkv", x).split(x.shape[1], dim=1)
    outputs = []
    for head in range(heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = queries[:, part] @ keys[:, part].T * head_dim**-0.5
        if bias is not None:
            scores = scores + bias[head]
        outputs.append(F.softmax(scores, dim=-1) @ values[:, part])
    return linear(params, f"{name}.proj", torch.cat(outputs, dim=1))


def mlp(params: Params, name: str, x: Tensor) -> Tensor:
    """[..., C] to [..., C] through 4C channels."""
    return linear(params, f"{name}.fc2", F.gelu(linear(params, f"{name}.fc1", x)))


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """[..., C] to [..., C']. Always with a bias, so that a missing one is an error."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """[..., C], each token by itself."""
    return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], LAYER_NORM_EPS)


def decode(params: Params, features: Tensor, mask: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Features of the mixed images [B, H/32, W/32, 8E] to two predictions, each [B, L, 3072].

    Both read mixed image i for their entry i: the first reconstructs image i, the second image B-1-i.
    """
    taken, mask_token = mask.flatten()[:, None], params["mask_token"][0]
    own: list[Tensor] = []
    partner: list[Tensor] = []
    for tokens in linear(params, "decoder_embed", features.flatten(1, 2)):
        for sequences, shown in (own, ~taken), (partner, taken):
            x = torch.where(shown, tokens, mask_token) + params["decoder_pos_embed"][0]
            for i in range(shape.decoder_depth):
                name = f"decoder_blocks.{i}"
                normed = layer_norm(params, f"{name}.norm1", x)
                x = x + attention(params, f"{name}.attn", normed, shape.decoder_num_heads)
                x = x + mlp(params, f"{name}.mlp", layer_norm(params, f"{name}.norm2", x))
            sequences.append(linear(params, "decoder_pred", layer_norm(params, "decoder_norm", x)))
    return torch.stack(own), torch.stack(partner)


def targets(images: Tensor, normalise: bool) -> Tensor:
    """What is to be predicted, [B, L, 3072]: pixels of each cell in the order row, column, channel."""
    patches = []
    for image in images:
        for top in range(0, image.shape[1], CELL):
            for left in range(0, image.shape[2], CELL):
                pixels = image[:, top : top + CELL, left : left + CELL].permute(1, 2, 0).flatten()
                if normalise:
                    variance = (pixels - pixels.mean()).square().sum() / (len(pixels) - 1)
                    pixels = (pixels - pixels.mean()) / (variance + TARGET_EPS).sqrt()
                patches.append(pixels)
    return torch.stack(patches).reshape(len(images), -1, CELL * CELL * 3)


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed position table [1, h*w, dim], float64: columns in the first half of the channels, rows after."""
    omegas, table = [1 / 10000 ** (i / (dim / 4)) for i in range(dim // 4)], []
    for row in range(height):
        for column in range(width):
            channels = []
            for coordinate in (column, row):
                channels += [math.sin(coordinate * omega) for omega in omegas]
                channels += [math.cos(coordinate * omega) for omega in omegas]
            table.append(channels)
    return torch.tensor([table], dtype=torch.float64)


def block_macs(tokens: int, channels: int, window_tokens: int) -> int:
    """Multiply-accumulates of a block: qkv, both attention products, the projection, the MLP of ratio 4."""
    per_token = 3 * channels**2 + 2 * window_tokens * channels + channels**2 + 2 * 4 * channels**2
    return tokens * per_token


def macs(shape: Shape, image_size: int, num_classes: int | None = None) -> int:
    """Multiply-accumulates of the encoder for one square image, plus those of a classification head."""
    grid, channels = image_size // PATCH, shape.embed_dim
    total = grid**2 * PATCH**2 * 3 * channels
    for s, depth in enumerate(shape.depths):
        if s > 0:
            grid, channels = grid // 2, channels * 2
            total += grid**2 * (2 * channels) * channels
        window = min(shape.window_sizes[s], grid)
        total += depth * block_macs(grid**2, channels, window**2)
    return total + channels * (num_classes or 0)


def decoder_macs(shape: Shape, embed: int, decoder_dim: int, image_size: int) -> int:
    """Multiply-accumulates of the decoder for one square image; `embed` is the encoder's output width, 8E.

    As many mixed images as images: each is projected once and then decoded as two sequences.
    """
    length = (image_size // CELL) ** 2
    sequence = shape.decoder_depth * block_macs(length, decoder_dim, length)
    sequence += length * decoder_dim * CELL**2 * 3
    return length * embed * decoder_dim + 2 * sequence
