"""The pretraining model against tests/reference.py, the method written down literally."""

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixmim_ds.models import MixMIM
from mixmim_ds.models.mixmim import normalise, patchify, unpatchify

SMALL_DECODER = {"decoder_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4}


def build(
    encoder: str = "mixmim_tiny", img_size: int | tuple[int, int] = 64, dtype: torch.dtype = torch.float64, **options
) -> MixMIM:
    """A model whose biases, norms and tables are no longer at their initial zeros and ones, which would hide errors."""
    torch.manual_seed(0)
    model = MixMIM(encoder, img_size, **{**SMALL_DECODER, **options}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def some_input(model: MixMIM, batch: int, masked: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    height, width = (side * 32 for side in model.grid)
    images = torch.randn(batch, 3, height, width, generator=generator).to(model.mask_token.dtype)
    cells = torch.randperm(model.grid[0] * model.grid[1], generator=generator)
    return images, (cells < masked).reshape(model.grid)


def shape_of(model: MixMIM) -> reference.Shape:
    stages = model.encoder.layers
    return reference.Shape(
        embed_dim=model.encoder.embed_dim,
        depths=tuple(len(stage.blocks) for stage in stages),
        num_heads=tuple(stage.blocks[0].attn.num_heads for stage in stages),
        window_sizes=tuple(stage.window[0] for stage in stages),
        decoder_depth=len(model.decoder_blocks),
        decoder_num_heads=model.decoder_blocks[0].attn.num_heads,
        norm_pix_loss=model.norm_pix_loss,
    )


def assert_equals_reference(model: MixMIM, images: Tensor, mask: Tensor, tolerance: float) -> None:
    loss, prediction = model(images, mask)
    loss.backward()
    params = {name: value.detach().clone() for name, value in model.state_dict().items()}
    learned = dict(model.named_parameters())
    for name in learned:
        params[name].requires_grad_()
    expected_loss, expected_prediction = reference.forward(params, images, mask, shape_of(model))
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(prediction, expected_prediction, rtol=tolerance, atol=tolerance)
    for name, parameter in learned.items():
        # A gradient is a sum of thousands of terms: its error scales with the largest entry, not with each.
        scale = max(params[name].grad.abs().max().item(), 1.0)
        torch.testing.assert_close(parameter.grad, params[name].grad, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(
    ("img_size", "batch", "masked", "options"),
    [
        (64, 2, 2, {}),
        (64, 4, 1, {"norm_pix_loss": False}),
        (96, 6, 4, {}),
        ((64, 96), 4, 3, {}),
        (128, 2, 8, {"decoder_depth": 1}),
        (224, 2, 24, {}),
    ],
)
def test_loss_prediction_and_gradients_equal_the_reference(
    img_size: int | tuple[int, int], batch: int, masked: int, options: dict
) -> None:
    model = build(img_size=img_size, **options)
    assert_equals_reference(model, *some_input(model, batch, masked), tolerance=1e-10)


def test_fp32_equals_the_reference() -> None:
    model = build(img_size=128, dtype=torch.float32)
    assert_equals_reference(model, *some_input(model, 4, 8), tolerance=1e-5)


def test_without_group_attention_tokens_of_both_images_meet() -> None:
    model = build(img_size=96, group_attention=False)
    images, mask = some_input(model, 4, 4)
    params, shape = dict(model.state_dict()), shape_of(model)
    hidden = reference.on_grid(mask, 96, 96)
    mixed = torch.stack([torch.where(hidden, images[3 - i], images[i]) for i in range(4)])
    own, partner = reference.decode(params, reference.encode(params, mixed, shape), mask, shape)  # groups unknown
    expected = torch.where(mask.flatten()[:, None], own, partner.flip(0))
    loss, prediction = model(images, mask)
    torch.testing.assert_close(prediction, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, (expected - reference.targets(images, True)).square().mean())
    assert not torch.allclose(prediction, build(img_size=96)(images, mask)[1], rtol=1e-3)


def test_without_dual_reconstruction_only_what_an_image_hides_of_itself_counts() -> None:
    model = build(img_size=96, dual_reconstruction=False)
    images, mask = some_input(model, 4, 4)
    loss, prediction = model(images, mask)
    target = reference.targets(images, True)
    hidden = [cell for cell in range(9) if mask.flatten()[cell]]
    expected = sum((prediction[i, c] - target[i, c]).square().mean() for i in range(4) for c in hidden) / 16
    torch.testing.assert_close(loss, expected)
    whole, same = build(img_size=96)(images, mask)
    assert torch.equal(prediction, same) and not torch.allclose(loss, whole, rtol=1e-3)


@pytest.mark.slow
def test_base_at_224_equals_the_reference() -> None:
    model = build("mixmim_base", 224, torch.float32, decoder_dim=512, decoder_depth=8, decoder_num_heads=16)
    assert_equals_reference(model, *some_input(model, 2, 24), tolerance=1e-5)


# Table of METHOD: pretraining parameters with the fixed position tables, GMAC of one image's forward pass.
@pytest.mark.parametrize(
    ("encoder", "parameters", "gmacs"),
    [
        ("mixmim_base", 114_665_784, 19.0),
        ("mixmim_large", 223_468_244, 38.5),
        ("mixmim_huge", 684_709_594, 120.3),
    ],
)
def test_size_and_work_are_the_papers(encoder: str, parameters: int, gmacs: float) -> None:
    model = MixMIM(encoder)
    tables = model.encoder.absolute_pos_embed.numel() + model.decoder_pos_embed.numel()
    assert sum(p.numel() for p in model.parameters()) + tables == parameters
    assert round(model.flops_per_image() / 2e9, 1) == gmacs
    shape = shape_of(model)
    expected = reference.macs(shape, 224) + reference.decoder_macs(shape, 8 * shape.embed_dim, 512, 224)
    assert model.flops_per_image() == 2 * expected


def test_weights_begin_as_the_authors_do() -> None:
    """Matrices uniform within Xavier's limit, no biases, mask token and bias tables normal."""
    torch.manual_seed(0)
    model = MixMIM("mixmim_tiny", 64, **SMALL_DECODER)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        limit = (6 / sum(module.weight.shape)) ** 0.5
        assert 0.98 * limit < module.weight.abs().max() <= limit, name
        assert module.bias is None or not module.bias.any(), name
    tables = [parameter for name, parameter in model.named_parameters() if "bias_table" in name]
    for values in (model.mask_token, *tables):
        assert 0.015 < values.std() < 0.025
    assert len(linear) == 4 * 9 + 3 + 2 and len(tables) == 7, "four a block, three patch mergings, two of the decoder"


def test_a_prediction_sees_nothing_of_its_place_nor_of_the_partner() -> None:
    model = build(img_size=96)
    images, mask = some_input(model, 4, 4)
    images.requires_grad_()
    _, prediction = model(images, mask)
    gradient = torch.autograd.grad(prediction[0][mask.flatten()].square().sum(), images)[0]
    seen = patchify(gradient).abs().sum(-1) > 0
    assert torch.equal(seen[0], ~mask.flatten()), "image 0's masked places are predicted from its visible ones"
    assert not seen[1:].any(), "and from no other image"


def test_complementary_masks_give_the_same() -> None:
    model = build(img_size=96)
    images, mask = some_input(model, 4, 4)
    loss, prediction = model(images, mask)
    other_loss, other_prediction = model(images, ~mask)
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_prediction, prediction, rtol=0, atol=1e-12)


# Half precision rounds every operation to 8 (bf16) or 11 (fp16) bits; a loss near 1 is a mean over many of them.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precision_is_near_full_and_keeps_its_types(dtype: torch.dtype, tolerance: float) -> None:
    model = build(dtype=torch.float32)
    images, mask = some_input(model, 4, 2)
    exact, _ = model(images, mask)
    model = model.to(dtype)
    model.encoder.absolute_pos_embed = model.encoder.absolute_pos_embed.float()  # engines leave buffers in fp32
    loss, prediction = model(images, mask)
    loss.backward()
    assert loss.dtype == torch.float32 and prediction.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss.item() - exact.item()) < tolerance * exact.item()


def test_autocast_runs_in_half_precision_on_full_weights() -> None:
    model = build(dtype=torch.float32)
    images, mask = some_input(model, 4, 2)
    exact, _ = model(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction = model(images, mask)
    loss.backward()
    assert prediction.dtype == torch.bfloat16 and model.mask_token.grad.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 2e-2 * exact.item()  # as above


class Cost:
    """What a forward and backward pass keep (bytes, parameters aside) and compute again (FLOPs of the backward)."""

    def __init__(self, model: MixMIM, images: Tensor, mask: Tensor) -> None:
        kept: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss, _ = model(images, mask)
        with FlopCounterMode(display=False) as counter:
            self.gradients = torch.autograd.grad(self.loss, list(model.parameters()))
        self.bytes, self.flops = sum(kept.values()), counter.get_total_flops()


# Tensors that selective checkpointing keeps do not pass the hooks, so its bytes are not comparable: its point is that
# no matrix product is computed twice.
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")
def test_activation_checkpointing_changes_memory_not_numbers() -> None:
    model = build(img_size=128, dtype=torch.float32)
    images, mask = some_input(model, 2, 8)
    costs = {"none": Cost(model, images, mask)}
    for mode in ("selective", "full"):
        model.set_grad_checkpointing(True, selective=mode == "selective")
        costs[mode] = Cost(model, images, mask)
        assert torch.equal(costs[mode].loss, costs["none"].loss)
        assert all(map(torch.equal, costs[mode].gradients, costs["none"].gradients))
    assert costs["full"].bytes < 0.25 * costs["none"].bytes
    assert costs["full"].flops > 1.25 * costs["none"].flops, "full recomputes all but the last product of a block"
    assert costs["selective"].flops == costs["none"].flops
    model.set_grad_checkpointing(False)
    assert Cost(model, images, mask).bytes == costs["none"].bytes


def test_cells_are_row_column_channel_and_come_back() -> None:
    images = torch.randn(2, 3, 64, 96)
    cells = patchify(images)
    assert cells.shape == (2, 6, 3072)
    assert torch.equal(cells[1, 4].reshape(32, 32, 3), images[1, :, 32:, 32:64].permute(1, 2, 0))
    assert torch.equal(unpatchify(cells, (2, 3)), images)
    normal, mean, deviation = normalise(cells)
    torch.testing.assert_close(normal * deviation + mean, cells)


@pytest.mark.parametrize(
    ("batch", "mask", "sentence"), [(3, (2, 2), "must be even"), (2, (3, 3), r"\(3, 3\), the images have \(2, 2\)")]
)
def test_input_that_cannot_be_mixed_is_refused(batch: int, mask: tuple[int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()(torch.zeros(batch, 3, 64, 64), torch.zeros(mask, dtype=torch.bool))


def test_an_encoder_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="model.encoder=resnet18 .* mixmim_base"):
        MixMIM("resnet18")
