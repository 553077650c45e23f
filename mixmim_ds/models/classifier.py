"""The encoder under fine-tuning: images in, loss and logits out.

Shapes: B images, K classes.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mixmim_ds.models.mixmim_sizes import create_encoder

HEAD_STD = 2e-5  # the authors': the classifier starts from (almost) nothing


class Classifier(nn.Module):
    """Encoder with a new classifier, and its loss.

    Args:
        encoder: name of a registered MixMIM encoder.
        img_size: pixels.
        classes: K.
        drop_path: rate of the last block.

    Raises:
        ValueError: the encoder is none of ours or does not fit the image size.
    """

    def __init__(self, encoder: str, img_size: int, classes: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.encoder = create_encoder(encoder, img_size=img_size, num_classes=classes, drop_path_rate=drop_path)
        trunc_normal_(self.encoder.get_classifier().weight, std=HEAD_STD)

    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute the blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable, selective)

    @property
    def depths(self) -> list[int]:
        """Blocks of each stage."""
        return [len(stage.blocks) for stage in self.encoder.layers]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks: what is compiled one by one."""
        return [block for stage in self.encoder.layers for block in stage.blocks]

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy with soft targets.

        Args:
            images: float [B, 3, H, W], normalised.
            targets: float [B, K], shares that sum up to 1.

        Returns:
            loss: float32 (or float64) scalar.
            logits: [B, K].
        """
        logits = self.encoder(images.to(self.encoder.get_classifier().weight.dtype))
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(exact), targets.to(exact)), logits

    def flops_per_image(self) -> int:
        """Floating-point operations (2 per multiply-accumulate) of one image's forward pass."""
        return 2 * (self.encoder.macs() + self.encoder.get_classifier().weight.numel())
