"""fuse(unet) against the same diffusers UNet: outputs, gradients, state dict, undone, copied, cast, saved, compiled."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from duotone.data.refusal import Refused
from duotone.engine.fuse import fuse, is_fused, unfuse


def plain(**settings) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **settings,
    )


def conditioned(**settings) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )


NETWORKS = {
    "plain": plain,
    "film": lambda: plain(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8),
    "classes": lambda: plain(num_class_embeds=4),
    "conditioned": conditioned,
    "linear": lambda: conditioned(use_linear_projection=True),
    "dropout": lambda: plain(dropout=0.1).eval(),
    "resnet sampling": lambda: plain(downsample_type="resnet", upsample_type="resnet"),
}


def call(unet) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    x, t = torch.randn(2, 3, 16, 16, generator=g).to(dtype), torch.tensor([3, 500])
    if isinstance(unet, UNet2DConditionModel):
        tokens = torch.randn(2, 5, 12, generator=g).to(dtype)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
        return unet(x, t, tokens, encoder_attention_mask=mask).sample
    labels = torch.tensor([1, 3]) if unet.class_embedding is not None else None
    return unet(x, t, class_labels=labels).sample


def gradients(unet) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    call(unet).square().sum().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_originals(name):
    unet = NETWORKS[name]()
    before, grads, keys = call(unet), gradients(unet), list(unet.state_dict())
    fused = fuse(unet, quiet=True)
    assert is_fused(unet) and fused.replaced["residual blocks"] > 0 and fused.replaced["attentions"] > 0
    assert (call(unet) - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)
    rms = torch.stack([g.norm() for g in grads.values()]).square().mean().sqrt()
    for key, grad in gradients(unet).items():
        assert (grad - grads[key]).norm() <= 1e-4 * torch.maximum(grads[key].norm(), 1e-2 * rms), key
    assert list(unet.state_dict()) == keys
    assert all(p.is_contiguous() for p in unet.parameters())
    unfuse(unet)
    assert not is_fused(unet) and torch.equal(call(unet), before)


def test_what_is_left_is_named_with_the_reason():
    fused = fuse(NETWORKS["resnet sampling"](), quiet=True)
    assert fused.left and all(why == "it also changes the resolution" for why in fused.left.values())


def test_a_second_fuse_does_nothing_and_says_so(capsys):
    unet = plain()
    fuse(unet)
    before = call(unet)
    fuse(unet)
    assert "fused already" in capsys.readouterr().out
    assert torch.equal(call(unet), before)


def test_it_can_be_copied_cast_and_saved(tmp_path):
    unet = conditioned()
    expected = call(unet)
    fuse(unet, quiet=True)
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        unet.conv_out.bias.add_(1)
    assert (call(twin) - expected).abs().max() <= 1e-5  # a copy has its own weights
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert call(half).dtype == torch.bfloat16 and (call(half).float() - expected).abs().max() < 0.05
    twin.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert (call(again) - expected).abs().max() <= 1e-6


def test_it_compiles_in_one_graph():
    unet = plain()
    expected = call(unet)
    fuse(unet, quiet=True)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 500])
    assert (compiled(x, t).sample - expected).abs().max() <= 1e-5


def test_anything_else_is_refused_by_name():
    with pytest.raises(Refused, match="UNet2DModel or UNet2DConditionModel of diffusers, not Linear"):
        fuse(torch.nn.Linear(2, 2))
    with pytest.raises(Refused, match="not AutoencoderKL"):
        fuse(AutoencoderKL(block_out_channels=(32,), layers_per_block=1))
