"""Windowed attention with a learned relative position bias, kept inside the tokens of one image.

Shapes: B images, H x W grid of tokens, C channels, G windows, N tokens of a window, K heads of D = C / K channels.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor, nn

from mixmim_ds.models.grids import Shape
from mixmim_ds.models.grouped import grouped_attention
from mixmim_ds.models.groups import Groups, Sequences
from mixmim_ds.models.tables import resample_biases


class WindowAttention(nn.Module):
    """Multi-head attention inside windows that do not overlap (Swin, arXiv 2103.14030, without its shifts).

    Args:
        dim: C, a multiple of num_heads.
        num_heads: K.
        window: rows and columns of a window; the grid is a multiple of both.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: dim is no multiple of num_heads.
    """

    relative_position_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, window: tuple[int, int], attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the {dim} channels of its stage.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window = window
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", None, persistent=False)
        self.init_non_persistent_buffers()
        self.register_load_state_dict_post_hook(WindowAttention._follow)

    @torch.jit.ignore
    def set_window(self, window: Shape) -> None:
        """Another window, rows and columns; the biases are interpolated. The same window changes nothing."""
        if window == self.window:
            return
        table = self.relative_position_bias_table
        biases = resample_biases(table.detach(), self.window, window)
        self.relative_position_bias_table = nn.Parameter(biases, requires_grad=table.requires_grad)
        self.window = window
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Computes the indices, which no file holds; timm's name for it, for models from the meta device."""
        device = self.relative_position_bias_table.device
        self.relative_position_index = gen_relative_position_index(self.window, device=device)

    @torch.jit.ignore
    def _follow(self, _: object) -> None:
        """The indices go where weights that were loaded with assign=True are, from the meta device as a rule."""
        if self.relative_position_index.device != self.relative_position_bias_table.device:
            self.init_non_persistent_buffers()

    def bias(self, windows: int, same_image: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is added to the attention's logits, [G*K, N, N]: the position bias, -inf between two images."""
        tokens = self.window[0] * self.window[1]
        # Rounded to the dtype of the logits last, so that the gradient is summed over windows and pairs in fp32.
        table = self.relative_position_bias_table
        bias = table.to(torch.promote_types(table.dtype, torch.float32))[self.relative_position_index.flatten()]
        bias = bias.reshape(tokens, tokens, self.num_heads).permute(2, 0, 1).expand(windows, -1, -1, -1)
        if same_image is not None:
            bias = bias.masked_fill(~same_image[:, None], float("-inf"))
        return bias.to(dtype).reshape(windows * self.num_heads, tokens, tokens)

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C]; groups: who may attend to whom in a window, None = all to all."""
        qkv = self.qkv(x)
        sequences = None if groups is None else groups.sequences
        if sequences is None:
            x = self.attend(qkv, None if groups is None else groups.same_image)
        else:
            x = self.attend_in_sequences(qkv, sequences)
        return self.proj_drop(self.proj(x))

    @torch.jit.unused
    def attend_in_sequences(self, qkv: Tensor, sequences: Sequences) -> Tensor:
        """[B, H, W, 3C] -> [B, H, W, C], each sequence by itself."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        x, _ = grouped_attention(qkv.flatten(1, 2), table, index, self.window[1], *sequences)
        return x.unflatten(1, qkv.shape[1:3])

    def attend(self, qkv: Tensor, same_image: Tensor | None) -> Tensor:
        """[B, H, W, 3C] -> [B, H, W, C] by PyTorch's own attention, the plain way; same_image: bool [G, N, N]."""
        batch, height, width, _ = qkv.shape
        win_h, win_w = self.window
        rows, columns = height // win_h, width // win_w
        heads, head_dim = self.num_heads, self.head_dim
        # The windows stand beside the heads, not in the batch: so one bias serves every image without being copied,
        # and cutting the windows costs the one copy that splitting the heads costs anyway.
        qkv = qkv.reshape(batch, rows, win_h, columns, win_w, 3, heads, head_dim)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, batch, rows * columns * heads, win_h * win_w, head_dim).unbind(0)
        bias = self.bias(rows * columns, same_image, q.dtype)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        x = x.reshape(batch, rows, columns, heads, win_h, win_w, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, height, width, heads * head_dim)
