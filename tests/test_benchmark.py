"""The benchmarks: what they compare is the same computation, and the commands say what they measured."""

import torch

from mixmim_ds.benchmark.plain import PlainMixMIM
from mixmim_ds.models import MixMIM


def test_the_plain_method_computes_the_same() -> None:
    torch.manual_seed(0)
    for size, options in ((64, {}), (128, {"norm_pix_loss": False})):
        model = MixMIM("mixmim_tiny", size, decoder_dim=64, decoder_depth=2, decoder_num_heads=4, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)  # zeros and ones would hide errors
        plain, grid = PlainMixMIM(model), (size // 32, size // 32)
        images, mask = torch.randn(4, 3, size, size), torch.rand(grid) < 0.5
        (loss, prediction), (plain_loss, plain_prediction) = model(images, mask), plain(images, mask)
        torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain_prediction, prediction, rtol=1e-4, atol=1e-4)
        (loss + plain_loss).backward()
        ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            scale = max(parameter.grad.abs().max().item(), 1.0)
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)
