"""Our UNet against diffusers': same names, outputs and gradients, in both directions, over random configurations."""

import contextlib
import copy
import inspect
import random
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from duotone.data.refusal import Refused
from duotone.engine.exchange import diffusers_unet
from duotone.engine.model.blocks import ResBlock
from duotone.engine.model.unet import UNet, UNetConfig

CLASSES = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}


def random_config(seed: int) -> UNetConfig:
    """A small configuration that diffusers can hold."""
    draw = random.Random(seed)
    while True:
        config = any_config(draw)
        with contextlib.suppress(diffusers_unet.Inexpressible):
            diffusers_unet.to_config(config, 16)
            return replace(config, down_pads_ends=seed % 3 == 0)


def any_config(draw: random.Random) -> UNetConfig:
    levels = draw.choice([1, 2, 3])
    cross = draw.random() < 0.5
    kinds = ["none", "self", "cross"] if cross else ["none", "self"]
    attention = [draw.choice(kinds) for _ in range(levels)]
    if cross:
        attention[draw.randrange(levels)] = "cross"
    groups = draw.choice([4, 8, 16])
    channels = tuple(groups * draw.choice([1, 2, 3]) for _ in range(levels))
    heads = tuple(draw.choice([h for h in (1, 2, 4) if width % h == 0]) for width in channels)
    if not cross:
        head_width = draw.choice([2, 4])
        heads = tuple(max(1, width // head_width) for width in channels)
    film = draw.random() < 0.4
    same = draw.choice([1, 2])
    return UNetConfig(
        channels=channels,
        attention=tuple(attention),
        middle=draw.choice(["cross", "single", "absent"] if cross else ["self", "none", "absent"]),
        heads=heads,
        blocks=tuple(draw.choice([1, 2]) for _ in range(levels)) if cross else (same,) * levels,
        depth=tuple(draw.choice([1, 2]) for _ in range(levels)),
        in_channels=draw.choice([1, 3, 4]),
        out_channels=draw.choice([1, 3]),
        context_width=draw.choice([8, 24]),
        groups=groups,
        film=film,
        middle_norm=cross or not film or draw.random() < 0.5,
        dropout=draw.choice([0.0, 0.3]),
        linear_projection=draw.random() < 0.5,
        time_flip=draw.random() < 0.7,
        time_shift=draw.choice([0, 1]),
        time_width=draw.choice([None, 40]),
        zero_init=False,
    )


def theirs_of(config: UNetConfig, size: int, classes: int | None = None):
    theirs = diffusers_unet.to_config(config, size, classes)
    cls = CLASSES[theirs.pop("_class_name")]
    return cls(**theirs).eval()


def inputs_of(config: UNetConfig, size: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(2, config.in_channels + config.extra_channels, size, size, generator=g),
        "time": torch.rand(2, generator=g) * 999,
        "tokens": torch.randn(2, 7, config.context_width, generator=g),
        "mask": torch.rand(2, 7, generator=g) < 0.7,
        "labels": torch.tensor([0, 2]),
    }
    inputs["mask"][:, 0] = True
    return inputs


def ours(unet: UNet, i: dict) -> torch.Tensor:
    vector = unet.class_embedding(i["labels"]) if hasattr(unet, "class_embedding") else None
    return unet(i["x"], i["time"], vector, i["tokens"], i["mask"])


def their(model, i: dict) -> torch.Tensor:
    labels = i["labels"] if model.class_embedding is not None else None
    if isinstance(model, UNet2DConditionModel):
        return model(i["x"], i["time"], i["tokens"], labels, encoder_attention_mask=i["mask"]).sample
    return model(i["x"], i["time"], labels).sample


def gradients(model, forward, inputs: dict, dtype=torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and every parameter's gradient under a fixed random cotangent."""
    model = copy.deepcopy(model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    output = forward(model, inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (output * cotangent).sum().backward()
    return output.detach(), {name: p.grad.double() for name, p in model.named_parameters()}


def assert_same(unet: UNet, model, i: dict) -> None:
    """Outputs within 1e-5 of scale; gradients within 1e-4 of max(|g|, 1e-3 of the RMS norm over parameters).

    Where the true gradient is zero (in whatever precedes a norm with one channel per group), diffusers in fp32 misses
    that bar against itself in float64. There, our error against float64 must be within 5e-6 of the RMS norm: it is the
    rest of sums over 784 pixels that cancel (theirs leaves up to 1e-6).
    """
    a, ours_g = gradients(unet, ours, i)
    b, theirs_g = gradients(model, their, i)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
    rms = torch.stack([g.norm() for g in theirs_g.values()]).square().mean().sqrt()
    bar = {name: 1e-4 * torch.maximum(g.norm(), 1e-3 * rms) for name, g in theirs_g.items()}
    missed = [name for name in bar if (ours_g[name] - theirs_g[name]).norm() > bar[name]]
    if missed:
        _, true_g = gradients(model, their, i, torch.float64)
        for name in missed:
            assert true_g[name].norm() <= 1e-3 * rms, name
            assert (ours_g[name] - true_g[name]).norm() <= 5e-6 * rms, name


def size_of(config: UNetConfig, draw: random.Random) -> int:
    """A side that diffusers can take: any if all levels are UNet2DConditionModel's own, else one that halves evenly."""
    uneven = [13, 18] if "cross" in config.attention and "self" not in config.attention else []
    return draw.choice([12, 16, 28, *uneven])


@pytest.mark.parametrize("seed", range(60))
def test_random_configuration_equals_diffusers(seed):
    config, draw = random_config(seed), random.Random(seed)
    classes, size = draw.choice([None, 3]), size_of(config, draw)
    torch.manual_seed(seed)
    unet, model = config.build().eval(), theirs_of(config, size, classes).eval()
    if classes:
        # Our class embedding is in the label's conditioner, outside of the UNet; here it is put where theirs is.
        unet.class_embedding = torch.nn.Embedding(classes, config.embedding_width)
    model.load_state_dict(unet.state_dict())  # strict: every name and shape
    unet.load_state_dict(model.state_dict())
    assert_same(unet, model, inputs_of(config, size, seed))


SEEDS = {
    # text at 128 px: cross-attention with 4 heads of 32, 64 and 96; run at 32 px
    "coco": (UNetConfig(zero_init=False), 32, 109_466_115),
    # six levels, head width 8, 512 px; run at 64 px
    "image_folder": (
        UNetConfig(
            channels=(128, 128, 256, 256, 512, 512),
            attention=("none", "none", "none", "none", "self", "none"),
            middle="self",
            heads=(16, 16, 32, 32, 64, 64),
            blocks=(2,) * 6,
            depth=(1,) * 6,
            zero_init=False,
        ),
        64,
        None,
    ),
    # the class as 4 extra channels, 28 -> 14 -> 7, one channel per group at the top
    "mnist": (
        UNetConfig(
            channels=(32, 64, 64),
            attention=("none", "self", "self"),
            middle="self",
            heads=(4, 8, 8),
            blocks=(2, 2, 2),
            depth=(1, 1, 1),
            in_channels=1,
            extra_channels=4,
            out_channels=1,
            zero_init=False,
        ),
        28,
        1_708_161,
    ),
}


LARGE = [pytest.param(name, marks=pytest.mark.long) if name == "image_folder" else name for name in SEEDS]


@pytest.mark.parametrize("name", LARGE)
def test_published_network_equals_diffusers(name):
    config, size, parameters = SEEDS[name]
    torch.manual_seed(0)
    unet, model = config.build().eval(), theirs_of(config, size)
    if parameters:
        assert sum(p.numel() for p in unet.parameters()) == parameters
    model.load_state_dict(unet.state_dict())
    assert_same(unet, model, inputs_of(config, size, 0))


RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "recipes").glob("*.py")}
NEAREST = {
    # Settings that diffusers has no field for, replaced by the nearest ones; the page of each recipe says so.
    "celeba_edm": {"blocks": (2, 2, 2)},
    "cifar10_guided": {"heads": (4, 8, 16)},
    "celeba_hq_attributes": {"film_shared": False},
    "cifar10_attributes": {"film_shared": False},
    "mnist_attributes": {"film_shared": False},
}
AT = {"celeba_hq_attributes": 32, "mnist_attributes": 28, "mnist_concat": 28}


def network_of_recipe(name: str) -> UNetConfig:
    return runpy.run_path(str(RECIPES[name]), run_name="recipe")["recipe"].model


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"coco_clip", "image_folder", "mnist_concat"}))
def test_every_recipes_network_equals_diffusers(name):
    """The other recipes' networks, at the smallest sides that keep their levels; SEEDS has the three left out here."""
    if name in NEAREST:
        with pytest.raises(diffusers_unet.Inexpressible):
            diffusers_unet.to_config(network_of_recipe(name), 32)
    config = replace(network_of_recipe(name), zero_init=False, **NEAREST.get(name, {}))
    size = AT.get(name, 16)
    torch.manual_seed(0)
    unet, model = config.build().eval(), theirs_of(config, size)
    model.load_state_dict(unet.state_dict())
    assert_same(unet, model, inputs_of(config, size, 0))


@pytest.mark.parametrize(("name", "recipe"), [("coco", "coco_clip"), ("image_folder",) * 2, ("mnist", "mnist_concat")])
def test_the_published_networks_are_the_recipes(name, recipe):
    assert replace(network_of_recipe(recipe), zero_init=False) == SEEDS[name][0]


STABLE_DIFFUSION = {
    "1.5": ({"attention_head_dim": 8, "cross_attention_dim": 768}, 859_520_964),
    "2.1": (
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        865_910_724,
    ),
}


@pytest.mark.parametrize("version", STABLE_DIFFUSION)
def test_stable_diffusion_has_the_same_names_and_count(version):
    theirs, count = STABLE_DIFFUSION[version]
    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, **theirs)
        unet = diffusers_unet.from_config({**model.config, "_class_name": "UNet2DConditionModel"}).build()
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in unet.parameters()) == count


HO = {  # The configuration of the published CIFAR-10 network of Ho et al. 2020 in diffusers' form
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def test_ho_et_als_network_equals_diffusers():
    """35.7 M parameters; its downsamples are padded only at the ends."""
    torch.manual_seed(0)
    model = UNet2DModel(**{key: v for key, v in HO.items() if not key.startswith("_")}).eval()
    unet = diffusers_unet.from_config(HO).build().eval()
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    unet.load_state_dict(model.state_dict())
    assert_same(unet, model, inputs_of(unet.config, 16, 0))


@pytest.mark.parametrize("seed", range(12))
def test_configuration_survives_the_round_trip(seed):
    config = random_config(seed)
    model = theirs_of(config, 16)
    back = diffusers_unet.from_config({**model.config, "_class_name": type(model).__name__})
    with torch.device("meta"):
        a, b = config.build(), back.build()
    assert {n: p.shape for n, p in a.named_parameters()} == {n: p.shape for n, p in b.named_parameters()}


@pytest.mark.parametrize(
    "feature",
    [
        {"only_cross_attention": True},
        {"class_embed_type": "timestep"},
        {"addition_embed_type": "text"},
        {"conv_in_kernel": 5},
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
        {"_class_name": "UNet3DConditionModel"},
    ],
)
def test_a_feature_that_is_not_supported_is_named(feature):
    model = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32] * 4}
    model |= {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4} | feature
    key, value = next(iter(feature.items()))
    with pytest.raises(
        Refused, match=value[0] if isinstance(value, list) else (str(value) if key == "_class_name" else key)
    ):
        diffusers_unet.from_config(model)


def test_a_feature_that_no_level_has_is_no_feature():
    model = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32] * 2, "layers_per_block": 1}
    model |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = diffusers_unet.from_config(model | {"only_cross_attention": [False, False]})
    assert config == diffusers_unet.from_config(model)
    with pytest.raises(Refused, match="only_cross_attention"):
        diffusers_unet.from_config(model | {"only_cross_attention": [False, True]})


BASE = {
    UNet2DConditionModel: dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
    ),
    UNet2DModel: dict(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    ),
}
OTHERWISE = {
    "sample_size": 8,
    "in_channels": 5,
    "out_channels": 2,
    "center_input_sample": True,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": ("DownBlock2D", "KDownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "only_cross_attention": True,
    "block_out_channels": (32, 16),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "mid_block_scale_factor": 2,
    "dropout": 0.3,
    "act_fn": "gelu",
    "norm_num_groups": 4,
    "norm_eps": 1e-2,
    "cross_attention_dim": (24, 16),
    "transformer_layers_per_block": 2,
    "reverse_transformer_layers_per_block": [1, 2],
    "encoder_hid_dim": 8,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 4,
    "num_attention_heads": 4,
    "dual_cross_attention": True,
    "use_linear_projection": True,
    "class_embed_type": "identity",
    "addition_embed_type": "text",
    "addition_time_embed_dim": 8,
    "num_class_embeds": 3,
    "upcast_attention": True,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 2.0,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 40,
    "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu",
    "time_cond_proj_dim": 8,
    "conv_in_kernel": 5,
    "conv_out_kernel": 5,
    "projection_class_embeddings_input_dim": 8,
    "attention_type": "gated",
    "class_embeddings_concat": True,
    "mid_block_only_cross_attention": True,
    "cross_attention_norm": "layer_norm",
    "addition_embed_type_num_heads": 8,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 4,
    "add_attention": False,
    "num_train_timesteps": 100,
}
FIELDS = [
    (cls, name)
    for cls in BASE
    for name in inspect.signature(cls.__init__).parameters
    if name not in ("self", "args", "kwargs")
]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_every_field_of_theirs_is_obeyed_or_refused_by_name(cls, name):
    """Each field of both classes at a value other than its default: the same output, or a refusal that names it."""
    torch.manual_seed(0)
    settings = BASE[cls] | {name: OTHERWISE[name]}
    try:
        config = diffusers_unet.from_config({**settings, "_class_name": cls.__name__})
    except Refused as refusal:
        value = OTHERWISE[name]
        assert name in str(refusal) or (isinstance(value, tuple) and value[-1] in str(refusal))
        return
    model, unet = cls(**settings).eval(), config.build().eval()
    named = {key: v for key, v in model.state_dict().items() if not key.startswith("class_embedding.")}
    unet.load_state_dict(named)
    i = inputs_of(config, 8, 0)
    extra = {"class_labels": torch.tensor([0, 2])} if name == "num_class_embeds" else {}
    vector = model.class_embedding(extra["class_labels"]) if extra else None
    tokens = (i["tokens"],) if cls is UNet2DConditionModel else ()
    with torch.no_grad():
        expected = model(i["x"], i["time"], *tokens, **extra).sample
        got = unet(i["x"], i["time"], vector, i["tokens"])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a_field_of_next_year": "on"}, "a_field_of_next_year = 'on' is not supported"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"block_out_channels": (12, 36), "norm_num_groups": 4}, "attention_head_dim = 8, which does not divide 36"),
    ],
)
def test_what_would_be_ignored_or_would_break_is_refused(change, says):
    with pytest.raises(Refused, match=says):
        diffusers_unet.from_config({**BASE[UNet2DModel], "_class_name": "UNet2DModel", **change})


def test_a_config_that_lacks_its_blocks_is_refused():
    with pytest.raises(Refused, match="without block_out_channels in its config.json"):
        diffusers_unet.from_config({"_class_name": "UNet2DModel"})


@pytest.mark.parametrize("heads,held", [(2, True), (1, False), (4, False)])
def test_a_middle_that_would_count_other_heads_is_refused_both_ways(heads, held):
    """diffusers' middle takes the last level's setting as the number of heads, self-attention takes it as their width."""
    config = replace(UNetConfig(), channels=(8, 8, 4), attention=("cross", "cross", "self"), heads=(4 // heads, 1, heads),
                     blocks=(1, 1, 1), depth=(1, 1, 1), groups=4, context_width=8, zero_init=False)  # fmt: skip
    if held:
        unet, model = config.build().eval(), theirs_of(config, 16)
        model.load_state_dict(unet.state_dict())
        assert_same(unet, model, inputs_of(config, 16, 0))
        return
    with pytest.raises(diffusers_unet.Inexpressible, match="as many heads as a head of the last level"):
        diffusers_unet.to_config(config, 16)
    theirs = diffusers_unet.to_config(replace(config, heads=(2, 1, 2)), 16) | {"attention_head_dim": [4 // heads] * 3}
    with pytest.raises(Refused, match="middle has other heads than its last level"):
        diffusers_unet.from_config(theirs)


def test_odd_sizes_come_back_as_they_went_in():
    config = UNetConfig(
        channels=(16, 16, 16),
        attention=("none",) * 3,
        middle="none",
        heads=(1,) * 3,
        blocks=(1,) * 3,
        depth=(1,) * 3,
        groups=8,
    )
    assert config.build()(torch.randn(1, 3, 27, 35), torch.zeros(1)).shape == (1, 3, 27, 35)


def test_gradient_checkpointing_runs_every_block_again_and_changes_no_gradient():
    """Dropout included: a block drops again what it dropped the first time."""
    config = replace(random_config(next(s for s in range(9) if "cross" in random_config(s).attention)), dropout=0.3)
    torch.manual_seed(0)
    unet, runs = config.build(), []
    i = inputs_of(config, 16, 0)
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    grads, counts = [], []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        torch.manual_seed(5)
        ours(unet, i).square().sum().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
        counts.append(len(runs))
        runs.clear()
    assert counts == [len(blocks), 2 * len(blocks)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_skip_and_what_it_joins_get_dense_gradients(backend):
    """If they got slices of one gradient, each would have to be copied by the operator that takes it next."""
    torch.manual_seed(0)
    block = ResBlock(24, 8, 16, groups=4, eps=1e-5, film=False, shared=False, dropout=0.0)
    if backend:
        block.compile(backend=backend, fullgraph=True)
    x_NCHW, skip_NCHW = (
        torch.randn(2, width, 6, 6).to(memory_format=torch.channels_last).requires_grad_() for width in (16, 8)
    )
    embedding_NE = torch.randn(2, 16)
    apart = torch.autograd.grad(block(x_NCHW, embedding_NE, skip_NCHW).square().sum(), (x_NCHW, skip_NCHW))
    joined_NCHW = torch.cat([x_NCHW, skip_NCHW], dim=1)
    outside = torch.autograd.grad(block(joined_NCHW, embedding_NE).square().sum(), (x_NCHW, skip_NCHW))
    for mine, expected in zip(apart, outside):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        assert mine.equal(expected)


def test_activations_stay_channels_last():
    config = random_config(1)
    unet, seen = config.build(), []

    def look(module, inputs, output) -> None:
        image = output[0] if isinstance(output, tuple) else output
        if image.dim() == 4:
            seen.append(image.is_contiguous(memory_format=torch.channels_last))

    for name, module in unet.named_modules():
        if name.endswith(("conv1", "conv2", "conv", "conv_out", "norm1", "norm2")):
            module.register_forward_hook(look)
    ours(unet, inputs_of(config, 16, 0))
    assert seen and all(seen)


def film_pair() -> tuple[UNet, UNet]:
    """A network with one projection for all blocks, and a twin in which every block has that projection's first rows."""
    config = UNetConfig(
        channels=(16, 32),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=8,
        groups=8,
        film=True,
        film_shared=True,
        zero_init=False,
    )
    torch.manual_seed(0)
    shared, own = config.build(), replace(config, film_shared=False).build()
    named = shared.state_dict()
    weight, bias = (named.pop(f"film_projection.{part}") for part in ("weight", "bias"))
    for name, module in own.named_modules():
        if isinstance(module, ResBlock):
            rows = [*range(module.out_width), *range(32, 32 + module.out_width)]
            named |= {f"{name}.time_emb_proj.weight": weight[rows], f"{name}.time_emb_proj.bias": bias[rows]}
    own.load_state_dict(named)
    return shared, own


def test_a_shared_film_projection_is_every_blocks_own():
    shared, own = film_pair()
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    outputs = [unet(x, torch.tensor([3.0, 700.0]), None, tokens) for unet in (shared, own)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    rows_of = {m.out_width: [] for m in own.modules() if isinstance(m, ResBlock)}
    for module in own.modules():
        if isinstance(module, ResBlock):
            rows_of[module.out_width].append(module.time_emb_proj.weight.grad)
    expected = torch.zeros_like(shared.film_projection.weight)
    for width, grads in rows_of.items():
        for grad in grads:
            expected[:width] += grad[:width]
            expected[32 : 32 + width] += grad[width:]
    torch.testing.assert_close(shared.film_projection.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_diffusers_is_said_not_to_hold_a_shared_projection():
    with pytest.raises(diffusers_unet.Inexpressible, match="one FiLM projection for all blocks"):
        diffusers_unet.to_config(film_pair()[0].config, 8)
    with pytest.raises(Refused, match="model.film_shared"):
        UNetConfig(film_shared=True).check()
