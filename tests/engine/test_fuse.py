"""fuse(unet) against the same diffusers UNet: outputs, gradients, state dict, undone, copied, cast, saved, compiled."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D as TheirBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from duotone.data.refusal import Refused
from duotone.engine.fuse import fuse, is_fused, unfuse
from duotone.kernels import attention, group_norm_silu


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
    usual = dict(
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
    )
    return UNet2DConditionModel(**usual | settings)


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
    if "cross_attention_dim" in unet.config:
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


class AttnProcessor(AttnProcessor2_0):  # under the name of diffusers' own
    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **options) / 2


class OfAModule(torch.nn.Module):
    """A processor that is a module, as some adapters bring."""

    def forward(self, attn, *arguments, **options):
        return AttnProcessor2_0()(attn, *arguments, **options) / 2


OfAModule.__name__ = "AttnProcessor2_0"


class ResnetBlock2D(TheirBlock):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options) / 2


class Act(torch.nn.SiLU):
    def forward(self, x):
        return super().forward(x) / 2


def every(unet, kind: str) -> list:
    return [part for part in unet.modules() if type(part).__name__ == kind]


def processor_of_a_familiar_name(unet):
    unet.set_attn_processor(AttnProcessor())


def processor_that_is_a_module(unet):
    unet.set_attn_processor(OfAModule())


def blocks_of_a_familiar_name(unet):
    for block in every(unet, "ResnetBlock2D"):
        block.__class__ = ResnetBlock2D


def acts_of_another_formula(unet):
    for block in every(unet, "ResnetBlock2D"):
        block.nonlinearity = Act()


def acts_that_are_watched(unet):
    for block in every(unet, "ResnetBlock2D"):
        block.nonlinearity.register_forward_hook(lambda *found: found[-1] / 2)


def blocks_with_a_forward_of_their_own(unet):
    for block in every(unet, "ResnetBlock2D"):
        own = block.forward
        block.forward = lambda *a, own=own, **k: own(*a, **k) / 2


def one_bias_among_keys_and_values(unet):
    for part in every(unet, "Attention"):
        part.to_v = torch.nn.Linear(part.to_v.in_features, part.to_v.out_features)


def norms_of_another_class(unet):
    class Norm(torch.nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) / 2

    for part in list(unet.modules()):
        for name, norm in part.named_children():
            if isinstance(norm, torch.nn.GroupNorm):
                setattr(part, name, Norm(norm.num_groups, norm.num_channels, norm.eps))


def norms_without_a_gain(unet):
    for part in every(unet, "ResnetBlock2D"):
        part.norm1 = torch.nn.GroupNorm(part.norm1.num_groups, part.norm1.num_channels, 0.5, affine=False)


def last_norm_watched(unet):
    unet.conv_norm_out.register_forward_hook(lambda *found: found[-1] - 1)


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return self.inner(x) / 2


def projections_without_a_weight(unet):
    for part in every(unet, "Transformer2DModel"):
        part.proj_in, part.proj_out = Wrapped(part.proj_in), Wrapped(part.proj_out)


WAYS = [
    processor_of_a_familiar_name,
    processor_that_is_a_module,
    blocks_of_a_familiar_name,
    acts_of_another_formula,
    acts_that_are_watched,
    blocks_with_a_forward_of_their_own,
    one_bias_among_keys_and_values,
    norms_of_another_class,
    norms_without_a_gain,
    last_norm_watched,
    projections_without_a_weight,
]
CASES = [(way, "conditioned", when) for way in WAYS for when in ("before", "after")]
CASES.remove((blocks_of_a_familiar_name, "conditioned", "after"))  # a fused block already has its class
CASES.append((projections_without_a_weight, "linear", "before"))


@pytest.mark.parametrize("way,name,when", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_not_diffusers_own_is_run_as_it_is(way, name, when):
    """Whether it was there before fuse() or came later."""
    torch.manual_seed(1)
    theirs, unet = NETWORKS[name](), NETWORKS[name]()
    if when == "after":
        fuse(unet, quiet=True)
    way(theirs)
    way(unet)
    unet.load_state_dict(theirs.state_dict())
    if when == "before":
        fuse(unet, quiet=True)
    expected = call(theirs)
    assert (expected - call(NETWORKS[name]())).abs().max() > 1e-3 * expected.abs().max(), "it makes a difference"
    assert (call(unet) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_gradients_that_are_watched_are_seen():
    unet, seen = conditioned(), []
    for name, part in unet.named_modules():
        if name.rpartition(".")[2] in ("conv1", "norm1", "to_q", "proj_in"):
            part.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    gradients(unet)
    expected = sorted(seen)
    seen.clear()
    fuse(unet, quiet=True)
    gradients(unet)
    assert sorted(seen) == expected and len(seen) > 10


def test_what_comes_later_is_fused_by_another_call():
    unet = conditioned()
    fuse(unet, quiet=True)
    unet.set_attn_processor(AttnProcessor2_0())
    assert fuse(unet, quiet=True).replaced == {"attentions": 8}
    assert "fused already" in str(fuse(unet, quiet=True))


def test_blocks_keep_their_names_and_processors_can_be_made_anew():
    """Tools find blocks by class name, and diffusers makes new processors of that class when adapters come or go."""
    unet = conditioned()
    names = [type(part).__name__ for part in unet.modules()]
    fuse(unet, quiet=True)
    assert [type(part).__name__ for part in unet.modules()] == names
    expected = call(unet)
    unet.set_attn_processor({name: type(own)() for name, own in unet.attn_processors.items()})
    assert torch.equal(call(unet), expected)


def test_what_was_put_around_a_fused_part_is_undone_first():
    unet = conditioned()
    fuse(unet, quiet=True)
    block = every(unet, "ResnetBlock2D")[0]
    own = block.forward
    block.forward = lambda *a, **k: own(*a, **k)
    expected = call(unet)
    with pytest.raises(Refused, match=r"unfuse\(\): .*resnets.0 has been given another forward"):
        unfuse(unet)
    assert torch.equal(call(unet), expected), "nothing was done"
    del block.forward
    unfuse(unet)
    assert not is_fused(unet)
    fuse(unet, quiet=True)
    torch.nn.utils.parametrizations.weight_norm(unet.conv_in)
    with pytest.raises(Refused, match=r"unfuse\(\): conv_in has been given another"):
        unfuse(unet)


def test_blocks_whose_norms_take_the_time_are_named():
    unet = conditioned(
        block_out_channels=(32, 64),
        attention_head_dim=16,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        resnet_time_scale_shift="ada_group",
        act_fn="gelu",
    )
    left = fuse(unet, quiet=True).left
    blocks = [name for name, part in unet.named_modules() if type(part).__name__ == "ResnetBlockCondNorm2D"]
    assert blocks and all(left[name] == "its norms take the time embedding" for name in blocks)


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


@pytest.mark.parametrize("name", ["plain", pytest.param("conditioned", marks=pytest.mark.long)])
def test_it_compiles_in_one_graph(name):
    unet = NETWORKS[name]()
    expected = call(unet)
    fuse(unet, quiet=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        assert (call(torch.compile(unet, backend=backend)) - expected).abs().max() <= 1e-5
    assert len(graphs) == 1
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    assert (call(compiled) - expected).abs().max() <= 1e-5


def test_fewer_operators_run_than_before(monkeypatch):
    """Counted as on a GPU, where each of our kernels is one call, on tensors without storage."""

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += not function.is_view
            return function(*args, **(kwargs or {}))

    def calls(unet) -> int:
        with Counting() as counting:
            call(unet).sum().backward()
        unet.zero_grad()
        return counting.calls

    for kernel in (group_norm_silu, attention):
        monkeypatch.setattr(kernel, "runs_kernel", lambda *_: True)
        monkeypatch.setattr(kernel, "launch", lambda *_: None)
    with FakeTensorMode():
        unet = plain()
        before = calls(unet)
        fuse(unet, quiet=True)
        assert calls(unet) <= 0.9 * before


@pytest.mark.parametrize("name", ["plain", "conditioned", "linear", "film"])
def test_no_part_leaves_channels_last(name):
    unet = NETWORKS[name]()
    fuse(unet, quiet=True)
    seen = []
    for part in unet.modules():
        part.register_forward_hook(lambda part, inputs, output: seen.append((type(part).__name__, output)))
    call(unet)
    images = [(kind, out) for kind, out in seen if isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[2] > 1]
    assert len(images) > 20
    assert not {kind for kind, out in images if not out.is_contiguous(memory_format=torch.channels_last)}


def test_many_images_keep_their_layout():
    """From 64 images on, diffusers' block converts to NCHW before it upsamples."""
    unet = plain()
    block = next(part for part in unet.modules() if type(part).__name__ == "Upsample2D")
    x_NCHW = torch.randn(64, block.channels, 4, 4).contiguous(memory_format=torch.channels_last)
    before = block(x_NCHW), block(x_NCHW, (7, 7))
    fuse(unet, quiet=True)
    after = block(x_NCHW), block(x_NCHW, (7, 7))
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(after, before))
    assert after[0].is_contiguous(memory_format=torch.channels_last)


def test_an_adapter_around_a_projection_is_run():
    """The module that LoRA puts in a layer's place has a weight too, but it must be called."""

    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        @property
        def weight(self):
            return self.layer.weight

        def forward(self, x):
            return 1.5 * self.layer(x)

    unet = conditioned()
    for transformer in [part for part in unet.modules() if type(part).__name__ == "Transformer2DModel"]:
        transformer.proj_in, transformer.proj_out = Adapter(transformer.proj_in), Adapter(transformer.proj_out)
        attention = transformer.transformer_blocks[0].attn1
        attention.to_k = Adapter(attention.to_k)
    expected = call(unet)
    fuse(unet, quiet=True)
    assert (call(unet) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_what_watches_a_layer_or_replaces_its_forward_is_run(way):
    """Hooks and replaced forwards are how tools read features and load weights on demand."""
    unet, seen = conditioned(), []
    names = ("to_q", "to_k", "to_v", "proj_in", "proj_out", "conv1", "conv2", "norm1", "norm2", "norm", "conv_norm_out")
    watched = {name: part for name, part in unet.named_modules() if name.rpartition(".")[2] in names}

    def watch(name, layer):
        if way == "hook":
            layer.register_forward_hook(lambda *_: seen.append(name))
        elif way == "pre-hook":
            layer.register_forward_pre_hook(lambda *_: seen.append(name))
        else:
            own = layer.forward
            layer.forward = lambda *a, **k: (seen.append(name), own(*a, **k))[1]

    for name, layer in watched.items():
        watch(name, layer)
    expected, order = call(unet), list(seen)
    seen.clear()
    fuse(unet, quiet=True)
    assert (call(unet) - expected).abs().max() <= 1e-5
    assert len(order) == len(watched) > 20 and sorted(seen) == sorted(order)


def test_a_row_whose_mask_admits_nothing_attends_to_all_as_theirs_does():
    unet, g = conditioned(), torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 3, 16, 16, generator=g), torch.tensor([3, 500]), torch.randn(2, 5, 12, generator=g))
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    expected = unet(*inputs, encoder_attention_mask=mask).sample
    fuse(unet, quiet=True)
    # diffusers adds -10,000 to the scores of that row, which leaves them three correct digits.
    assert (unet(*inputs, encoder_attention_mask=mask).sample - expected).abs().max() <= 2e-4


def test_it_can_be_moved():
    unet = conditioned()
    expected = call(unet)
    fuse(unet, quiet=True)
    ghost = copy.deepcopy(unet).to("meta")
    assert is_fused(ghost) and all(p.device.type == "meta" for p in ghost.parameters())
    ghost = ghost.to_empty(device="cpu")
    ghost.load_state_dict(unet.state_dict())
    assert (call(ghost) - expected).abs().max() <= 1e-5


class Halved(AttnProcessor2_0):
    """A user's own processor, as adapters bring them."""

    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **options) / 2


def test_a_processor_of_ones_own_is_kept():
    unet = conditioned()
    unet.set_attn_processor(Halved())
    expected, expected_grads = call(unet), gradients(unet)
    fused = fuse(unet, quiet=True)
    assert list(fused.left.values()) == 8 * ["its processor is Halved"]
    assert (call(unet) - expected).abs().max() <= 1e-5
    for name, gradient in gradients(unet).items():
        torch.testing.assert_close(gradient, expected_grads[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "processor", [attention_processor.AttnProcessor(), SlicedAttnProcessor(2)], ids=lambda p: type(p).__name__
)
def test_every_plain_processor_is_replaced_and_given_back(processor):
    unet = conditioned()
    unet.set_attn_processor(processor)
    expected = call(unet)
    assert not fuse(unet, quiet=True).left
    assert (call(unet) - expected).abs().max() <= 1e-5
    unfuse(unet)
    assert {type(p) for p in unet.attn_processors.values()} == {type(processor)}


class Own(UNet2DModel):
    """A user's own subclass."""


def test_a_subclass_is_an_instance_too():
    unet = plain()
    expected = call(unet)
    unet.__class__ = Own
    fuse(unet, quiet=True)
    assert is_fused(unet) and (call(unet) - expected).abs().max() <= 1e-5


def test_it_can_be_pickled_and_sent_to_another_process(tmp_path):
    """The whole network, as for torch.save and spawned workers; it is still fused there, and can be unfused."""
    unet = conditioned()
    fuse(unet, quiet=True)
    torch.save(unet, tmp_path / "unet.pt")
    torch.save(call(unet), tmp_path / "expected.pt")
    there = f"""
import runpy, torch
call = runpy.run_path({__file__!r})["call"]
from duotone.engine.fuse import is_fused, unfuse
unet, expected = (torch.load({str(tmp_path)!r} + f"/{{name}}.pt", weights_only=False) for name in ("unet", "expected"))
assert is_fused(unet) and (call(unet) - expected).abs().max() <= 1e-6
unfuse(unet)
assert not is_fused(unet) and (call(unet) - expected).abs().max() <= 1e-5
"""
    done = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_anything_else_is_refused_by_name():
    with pytest.raises(Refused, match="UNet2DModel or UNet2DConditionModel of diffusers, not Linear"):
        fuse(torch.nn.Linear(2, 2))
    with pytest.raises(Refused, match="not AutoencoderKL"):
        fuse(AutoencoderKL(block_out_channels=(32,), layers_per_block=1))
    with pytest.raises(Refused, match=r"unfuse\(\) takes .* not object"):
        unfuse(object())
