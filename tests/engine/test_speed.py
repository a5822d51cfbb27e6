"""The switches of engine/speed.py: they may change speed and rounding, nothing else."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import artifact, probe, speed
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import ClassMap
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.cuda_graph import Recordings
from duotone.engine.distributed import zero
from duotone.engine.memory import Estimate, estimate
from duotone.engine.model import blocks
from duotone.engine.model.blocks import GroupNormSiLU
from duotone.engine.model.network import Network
from duotone.engine.model.unet import UNet, UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample
from duotone.engine.sampling import guidance
from duotone.kernels.group_norm_tiling import tiling

SHAPE = UNetConfig(
    channels=(16, 16),
    attention=("none", "cross"),
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    context_width=16,
    groups=8,
    zero_init=False,
)
FACTS = Facts(classes=("cat", "dog"), attributes=("Bald", "Male"))
CPU = speed.Choice("cpu", "fp32", False)
ASKED = {
    "text": (ByteText(width=16, layers=1, heads=2, length=24), {"prompts": ["a cat", "a dog"]}, 0),
    "label": (Label(), {"labels": ["dog", "cat"]}, 0),
    "attributes": (Attributes(), {"attributes": [{"Bald": 1}, {"Male": 0}]}, 0),
    "class_map": (ClassMap(), {"labels": [0, 1]}, 4),
}


def exported(folder, kind: str):
    """An untrained model with this conditioning, in a file as a run leaves it."""
    torch.manual_seed(0)
    config, _, extra = ASKED[kind]
    reads = ("none", "cross" if config.port == "tokens" else "self")
    shape = replace(SHAPE, extra_channels=extra, attention=reads, middle=reads[1])
    recipe = Recipe(name="t", data=Shards(size=8), conditioning=(config,), model=shape, objective=EDM(sigma_max=5.0))
    network = artifact.build(recipe, FACTS)
    artifact.save(folder / "ema.safetensors", dict(network.named_parameters()), recipe, FACTS, 0)
    return folder


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ASKED)
def test_sampling_in_bf16_is_sampling_in_fp32_but_for_rounding(kind, tmp_path):
    folder = exported(tmp_path, kind)
    drawn = {}
    for precision in ("fp32", "bf16"):
        model = artifact.load(folder, speed=speed.Speed(device="cpu", precision=precision, compile=False))
        assert model.network.dtype == getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision])
        drawn[precision] = sample(model, **ASKED[kind][1], steps=6, guidance=2.0, sampler="euler", seed=3).astype(int)
    apart = np.abs(drawn["bf16"] - drawn["fp32"])
    assert 0 < apart.mean() < 4, "levels of 255"


def test_a_model_is_loaded_as_its_device_wants_it(tmp_path):
    folder = exported(tmp_path, "label")
    assert artifact.load(folder, "cpu").network.dtype == torch.float32
    padded = artifact.load(folder, "cpu", speed=replace(speed.SAMPLING, padded_ends=True, cuda_graphs=True))
    assert padded.network.unet.conv_in.padded_to == 8 and not padded.network.records, "no CUDA device, no recording"


# -------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("channels,extra", [(3, 0), (1, 0), (3, 4), (4, 4)])
def test_padded_ends_change_nothing(channels, extra):
    torch.manual_seed(0)
    plain = replace(SHAPE, in_channels=channels, out_channels=channels, extra_channels=extra).build().double()
    padded = copy.deepcopy(plain)
    padded.pad_ends(True)
    x_NCHW, tokens_NMD = torch.randn(2, channels + extra, 8, 8).double(), torch.randn(2, 5, 16).double()
    results = []
    for unet in (plain, padded):
        given_NCHW = x_NCHW.clone().requires_grad_()
        y_NCHW = unet(given_NCHW, torch.tensor([0.1, 0.7]), None, tokens_NMD)
        y_NCHW.square().sum().backward()
        results.append([y_NCHW.detach(), given_NCHW.grad, *(p.grad for p in unet.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    assert {name: p.shape for name, p in plain.named_parameters()} == {n: p.shape for n, p in padded.named_parameters()}


def test_padded_ends_hand_the_convolutions_multiples_of_eight(monkeypatch):
    unet, widths = SHAPE.build(), []
    unet.pad_ends(True)
    conv2d = torch.nn.functional.conv2d

    def noted(x_NCHW, weight, *rest, **named):
        widths.append(weight.shape[:2])
        return conv2d(x_NCHW, weight, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    unet(torch.randn(1, 3, 8, 8), torch.zeros(1), None, torch.randn(1, 5, 16))
    assert widths[0] == (16, 8) and widths[-1] == (8, 16)


@pytest.mark.parametrize("kind", ["text", "label"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_padded_ends_are_guided_as_dense_ones_are(kind, rescale, tmp_path, monkeypatch):
    """Guidance gets the padded output's first channels, but its kernel only takes images without gaps."""
    seen, step = [], guidance.guided_step

    def watched(output_NCHW, *rest, **named):
        seen.append(output_NCHW.is_contiguous(memory_format=torch.channels_last))
        return step(output_NCHW, *rest, **named)

    monkeypatch.setattr(guidance, "guided_step", watched)
    folder, drawn = exported(tmp_path, kind), []
    for padded in (False, True):
        model = artifact.load(folder, "cpu", speed=replace(speed.SAMPLING, padded_ends=padded))
        asked = {"steps": 3, "guidance": 3.0, "sampler": "euler", "seed": 3, "rescale": rescale}
        drawn.append(sample(model, **ASKED[kind][1], **asked).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].std() > 5
    assert len(seen) == 6 and all(seen[3:])


def test_every_norm_is_told_to_take_turns():
    unet = SHAPE.build()
    speed.make_ready(unet, speed.Speed(norms_in_turns=True), CPU)
    norms = [module for module in unet.modules() if isinstance(module, GroupNormSiLU)]
    assert len(norms) == 21 and all(norm.in_turns and not norm.joins_skips for norm in norms)


def test_norms_that_join_skips_change_nothing(monkeypatch):
    """On the way up, every block gets its skip separately and continues with the joined image that the norm returns."""
    calls = []

    def noted(x_NCHW, skip_NCHW, *arguments, **options):
        calls.append((x_NCHW.shape[1], skip_NCHW.shape[1]))
        return joined(x_NCHW, skip_NCHW, *arguments, **options)

    joined = blocks.joined_group_norm_silu
    monkeypatch.setattr(blocks, "joined_group_norm_silu", noted)
    torch.manual_seed(0)
    unet = SHAPE.build()
    inputs = (torch.randn(2, 3, 8, 8), torch.zeros(2), None, torch.randn(2, 5, 16))
    outputs = []
    for on in (False, True):
        speed.make_ready(unet, speed.Speed(norms_join_skips=on), CPU)
        y_NCHW = unet(*inputs)
        outputs.append([y_NCHW, *torch.autograd.grad(y_NCHW.square().sum(), unet.parameters())])
    assert calls == 4 * [(16, 16)], "every residual block on the way up"
    assert all(torch.equal(mine, expected) for mine, expected in zip(*outputs))


# -------------------------------------------------------------------------------------------------------- compiler


def test_compiling_without_a_compiler_is_one_line_with_the_remedy():
    """In a separate process, because torch looks for a compiler only once."""
    code = "from duotone.engine.speed import Speed, choose; choose(Speed(device='cpu')); choose(Speed(device='cpu', compile=True))"
    environment = os.environ | {"PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.splitlines()[-1].startswith(
        "duotone.data.refusal.Refused: speed.compile = True needs a C++ compiler on a CPU"
    )


def test_a_backend_that_torch_does_not_know_is_one_line_with_those_that_it_knows():
    with pytest.raises(Refused, match="speed.backend = indutcor: torch.compile knows .*inductor"):
        speed.choose(speed.Speed(compile=True, backend="indutcor"))
    assert speed.choose(speed.Speed(compile=True, backend="aot_eager")).compile
    assert not speed.choose(speed.Speed(backend="indutcor", device="cpu")).compile


def test_a_gpu_without_a_c_compiler_compiles_nothing_and_says_so(monkeypatch):
    """Triton builds each kernel's launcher with a C compiler; with another PATH there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert speed.choose(speed.Speed(precision="bf16")).compile
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    choice = speed.choose(speed.Speed(precision="bf16"))
    (line,) = speed.substitutions(speed.Speed(), choice)
    assert not choice.compile and line.startswith("no C compiler")
    with pytest.raises(Refused, match="speed.compile = True needs a C compiler"):
        speed.choose(speed.Speed(precision="bf16", compile=True))


def test_a_network_that_is_recorded_whole_has_no_recorded_blocks(tmp_path, monkeypatch):
    """Recording the next block would reuse the memory of the last one's output."""
    asked = []
    monkeypatch.setattr(speed, "compile_blocks", lambda network, switches: asked.append(switches) or 0)
    switches = speed.Speed(compile=True, backend="eager", cuda_graphs=True)
    artifact.load(exported(tmp_path, "label"), "cpu", speed=switches)
    assert [speed.compiler_options(replace(s, backend="inductor"))["triton.cudagraphs"] for s in asked] == [False]


def test_gradients_that_blocks_graphs_hold_are_added_up_elsewhere():
    """ZeRO-1 keeps a micro-batch's gradients where the backward pass left them, which is a graph's memory here."""
    graphs, on_gpu = speed.Speed(cuda_graphs=True), speed.Choice("cuda", "fp32", True)
    assert speed.records_blocks(graphs, on_gpu)
    for switches, choice in (
        (speed.Speed(), on_gpu),
        (graphs, speed.Choice("cpu", "fp32", True)),
        (graphs, speed.Choice("cuda", "fp32", False)),
        (replace(graphs, whole_step=True), on_gpu),
        (replace(graphs, backend="eager"), on_gpu),
    ):
        assert not speed.records_blocks(switches, choice)
    assert zero.stage_taken(zero.Zero(), "fp32", 2) == (1, None)
    assert zero.stage_taken(zero.Zero(), "fp32", 1, recorded=True) == (1, None)
    stage, why = zero.stage_taken(zero.Zero(), "fp32", 2, recorded=True)
    assert stage == 2 and "ZeRO-2" in why
    settings = dict(batch=4, micro=2, accumulation=2, precision="fp32", clip=1.0)
    assert zero.settings(zero.Zero(), **settings, recorded=True)["zero_optimization"]["stage"] == 2


def test_the_compiler_knows_every_option_that_it_is_given():
    """An unknown option would only be noticed on the first GPU: Inductor refuses it when a function is wrapped."""
    options = speed.compiler_options(speed.Speed(autotune=True, cuda_graphs=True))
    assert options == {"max_autotune": True, "triton.cudagraphs": True}
    torch.compile(lambda x: x, options=options)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(lambda x: x, options={"triton.no_such_switch": True})
    assert "TRITON" in torch._inductor.config.max_autotune_conv_backends, "convolutions are among what is tried"


def test_a_compiled_network_gives_what_it_gave():
    torch.manual_seed(0)
    unet = SHAPE.build().eval()
    inputs = (torch.randn(1, 3, 8, 8), torch.zeros(1), None, torch.randn(1, 5, 16))
    expected = unet(*inputs)
    compiled = copy.deepcopy(unet)
    count = speed.make_ready(compiled, speed.Speed(backend="aot_eager"), speed.Choice("cpu", "fp32", True))
    assert count == 8 + 4, "residual blocks and transformers"
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_network_reads_keys_and_values_that_are_already_projected():
    """As sampling passes them, one pair for each layer of every transformer, to blocks compiled with fullgraph."""
    torch.manual_seed(0)
    unet = replace(SHAPE, depth=tuple(2 for _ in SHAPE.depth)).build().eval()
    tokens = torch.randn(1, 5, SHAPE.context_width)
    pairs = [attention.keys_values(tokens) for attention in unet.cross_attentions()]
    inputs = torch.randn(1, 3, 8, 8), torch.zeros(1), None
    expected = unet(*inputs, tokens)
    torch.testing.assert_close(unet(*inputs, iter(pairs)), expected, rtol=1e-5, atol=1e-5)
    speed.make_ready(unet, speed.Speed(backend="aot_eager"), speed.Choice("cpu", "fp32", True))
    with torch.no_grad():
        torch.testing.assert_close(unet(*inputs, iter(pairs)), expected, rtol=1e-5, atol=1e-5)


def test_zero_3_runs_its_blocks_uncompiled(monkeypatch):
    """ZeRO-3 gathers weights between a block's modules, but a compiled block would have to be one graph."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    compiled = {stage: speed.choose(speed.Speed(), stage).compile for stage in (1, 2, 3)}
    assert compiled == {1: True, 2: True, 3: False}
    said = speed.substitutions(speed.Speed(), speed.choose(speed.Speed(), 3))
    assert said == ["ZeRO-3 gathers weights within the blocks, which are therefore not compiled"]
    with pytest.raises(Refused, match="speed.compile = True, but ZeRO-3"):
        Recipe(
            name="r", speed=speed.Speed(compile=True), zero=zero.Zero(stage=3), model=plain(), batch_size=100
        ).check()


def plain() -> UNetConfig:
    return replace(SHAPE, attention=("none", "self"), middle="self")


@pytest.mark.parametrize(
    "given, threads",
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({}, 6),
        ({"WORLD_SIZE": "4"}, 1),
        ({"LOCAL_WORLD_SIZE": "9"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, 3),
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "6"}, 3),  # as deepspeed sets it on each of three machines
    ],
    ids=str,
)
def test_threads_are_those_that_openmp_is_given_or_a_share_of_the_cores(given, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert speed.usual_threads() == threads


def test_what_has_no_effect_here_is_said():
    said = speed.substitutions(
        speed.Speed(autotune=True, cuda_graphs=True, norms_in_turns=True, norms_join_skips=True), CPU
    )
    assert any("speed.norms_join_skips has no effect without a CUDA device" in line for line in said)
    assert any("speed.norms_in_turns has no effect without a CUDA device" in line for line in said)
    assert any("speed.cuda_graphs has no effect without a CUDA device" in line for line in said)
    assert any("speed.autotune has no effect in training without speed.compile" in line for line in said)
    assert len(speed.substitutions(speed.Speed(), CPU)) == 1
    graphs = speed.Speed(cuda_graphs=True, backend="aot_eager", threads=4)
    said = [
        speed.substitutions(replace(graphs, compile=compiled), speed.Choice("cuda", "bf16", compiled))
        for compiled in (False, True)
    ]
    assert ["speed.compile" in line for line in said[0]] == [False, True]
    assert said[1] == [
        "speed.threads has no effect on a CUDA device",
        "speed.cuda_graphs has no effect in training without speed.backend = inductor",
    ]
    both = speed.Speed(cuda_graphs=True, whole_step=True)
    (line,) = speed.substitutions(both, speed.Choice("cuda", "bf16", True))
    assert line.startswith("speed.cuda_graphs has no effect with speed.whole_step")


# ---------------------------------------------------------------------------------------------------------- probes


def needed_by(unet: UNet, rows: int) -> Estimate:
    recipe = Recipe(name="r", data=Shards(size=8), model=SHAPE, batch_size=8, images=8)
    return estimate(Network(unet, []), recipe, rows, CPU, 1)


def test_two_steps_are_tried_and_leave_no_trace():
    unet = SHAPE.build()
    before = copy.deepcopy(unet.state_dict())
    drawn = torch.get_rng_state()
    assert probe.fits(unet, 8, 4, needed_by(unet, 4), speed.Speed(), CPU)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())


def test_what_runs_out_of_memory_does_not_fit(monkeypatch):
    unet, forward, seen = SHAPE.build(), UNet.forward, []

    def small(self, x_NCHW, *rest, **named):
        seen.append(len(x_NCHW))
        if len(x_NCHW) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, x_NCHW, *rest, **named)

    monkeypatch.setattr(UNet, "forward", small)
    tried = [probe.fits(unet, 8, rows, needed_by(unet, rows), speed.Speed(), CPU) for rows in (4, 2)]
    assert tried == [False, True] and seen == [4, 2, 2]


# ------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ASKED)
def test_a_recorded_network_draws_the_same_pictures(kind, tmp_path):
    folder = exported(tmp_path, kind)
    drawn = []
    for graphs in (False, True):
        model = artifact.load(folder, "cuda", speed=replace(speed.SAMPLING, cuda_graphs=graphs))
        assert model.network.records == graphs
        drawn.append(sample(model, **ASKED[kind][1], steps=6, guidance=2.0, interval=(0.1, 3.0), seed=3))
    np.testing.assert_array_equal(*drawn)


@pytest.mark.gpu
def test_a_recording_follows_its_inputs():
    call = Recordings(recording=True)
    x = torch.randn(4, 4, device="cuda")
    assert torch.equal(call("double", lambda t: 2 * t, x), 2 * x)
    assert torch.equal(call("double", lambda t: 2 * t, x + 1), 2 * (x + 1)) and len(call.recorded) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "switches",
    [{name: True} for name in ("cuda_graphs", "autotune", "padded_ends", "norms_in_turns", "norms_join_skips")],
    ids=str,
)
def test_a_switch_changes_rounding_at_most(switches):
    """Two training steps of a compiled network with and without the switch, gradients included."""
    side, results = 40 if "norms_in_turns" in switches else 8, []
    if "norms_in_turns" in switches:
        cut = tiling(SHAPE.channels[0], SHAPE.groups, side * side, 2, in_turns=True)
        assert cut.chunks > 1, "a map that one program holds takes no turns"
    for chosen in (speed.Speed(), speed.Speed(**switches)):
        torch.manual_seed(0)
        unet = SHAPE.build().to("cuda", torch.bfloat16)
        speed.make_ready(unet, chosen, speed.Choice("cuda", "bf16", True))
        for _ in range(2):
            torch.compiler.cudagraph_mark_step_begin()
            unet.zero_grad()
            inputs = (
                torch.ones(2, 3, side, side).cuda(),
                torch.zeros(2).cuda(),
                None,
                torch.ones(2, 5, 16).cuda().bfloat16(),
            )
            unet(*inputs).float().square().mean().backward()
        results.append(torch.cat([p.grad.flatten().float() for p in unet.parameters()]))
    assert (results[0] - results[1]).norm() <= 0.02 * results[0].norm()


@pytest.mark.gpu
def test_a_micro_batch_too_large_for_the_memory_does_not_fit():
    unet = SHAPE.build().cuda()
    choice, free = speed.Choice("cuda", "bf16", False), torch.cuda.mem_get_info()[0]
    assert probe.fits(unet, 8, 2, Estimate(0, 0), speed.Speed(), choice)
    assert not probe.fits(unet, 8, 2, Estimate(2 * free, 0), speed.Speed(), choice)
