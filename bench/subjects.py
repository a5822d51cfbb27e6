"""What bench/throughput.py and bench/ledger.py measure: every kernel's inputs, calls, definition, floor and peers."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import peers
import torch
from harness import recorded

from duotone.kernels import (
    adamw_ema,
    attention,
    attention_backends,
    diffuse,
    group_norm_silu,
    guided_step,
    squared_norm,
)


@dataclass(frozen=True)
class Subject:
    """One kernel as it is measured: its inputs for a case, the call, the definition, the bytes, the peers."""

    module: object
    draw: Callable  # (case, dtype, device) -> inputs by name
    ours: Callable
    reference: Callable
    floor: Callable  # (case, dtype) -> bytes that must move, forward and backward
    shrink: Callable  # case -> the same case small enough for the interpreter and a CPU
    peers: dict = field(default_factory=dict)  # name -> () -> call; the factory raises where the peer is absent
    label: str = ""  # the kernel's name by default
    covers: Callable = lambda case: True  # which of the module's cases

    @property
    def name(self) -> str:
        return self.label or self.module.NAME

    @property
    def cases(self) -> list:
        return [case for case in self.module.CASES if self.covers(case)]


def forward_backward(call, inputs):
    """Runs the call and, if the kernel is trained, computes the gradients of every leaf."""
    trained = leaves(inputs)

    def run():
        out = call(inputs)
        return (out, *torch.autograd.grad(out, trained, inputs["gradient"])) if trained else (out,)

    return run


def leaves(inputs):
    return [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]


def _draw_norm(case, dtype, device):
    x_NCHW = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(case.shape[1], device=device, requires_grad=True) for _ in range(2)]
    gradient = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    named = {"x": x_NCHW.requires_grad_(), "weight": weights[0], "bias": weights[1]}
    named |= {"groups": case.groups, "gradient": gradient}
    for name in peers.MODULATION if case.modulated else ():
        named[name] = torch.randn(case.shape[:2], dtype=dtype, device=device, requires_grad=True)
    return named


def _norm(function):
    def call(i):
        modulation = {name: i[name] for name in peers.MODULATION if name in i}
        return function(i["x"], i["weight"], i["bias"], i["groups"], **modulation)

    return call


_in_turns = functools.partial(group_norm_silu.group_norm_silu, in_turns=True)


def _has_turns(case):
    """True for maps larger than one program holds."""
    return case.timed and case.shape[2] * case.shape[3] >= 32 * 32


def _draw_attention(case, dtype, device):
    def tokens(length):
        shape = (case.images, length, case.heads, case.width)
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    mask_NM = None
    if case.masked:
        mask_NM = torch.ones(case.images, case.keys, dtype=torch.bool, device=device)
        mask_NM[:, case.keys // 4 :] = torch.arange(case.images, device=device)[:, None] % 2 == 0
    named = {"q": tokens(case.queries), "k": tokens(case.keys), "v": tokens(case.keys), "mask": mask_NM}
    return named | {"gradient": torch.randn_like(named["q"])}


def _attend(function):
    return lambda i: function(i["q"], i["k"], i["v"], mask_NM=i["mask"])


def _draw_diffuse(case, dtype, device):
    images = case.shape[0]
    image_NHWC = torch.randint(0, 256, case.shape, dtype=torch.uint8, device=device)
    flip_N = torch.zeros(images, dtype=torch.bool, device=device)
    coefficients_N4 = torch.rand(images, 4, device=device)
    positions_N = torch.arange(images, device=device)
    return {"arguments": (image_NHWC, flip_N, coefficients_N4, 1, positions_N, 0), "dtype": dtype}


def _draw_guided(case, dtype, device):
    images, *rest = case.shape
    prediction = torch.randn(2 * images, *rest, dtype=dtype, device=device)
    x_NCHW = torch.randn(case.shape, device=device)
    dense = [t.contiguous(memory_format=torch.channels_last) for t in (prediction, x_NCHW)]
    return {"arguments": (*dense, *torch.rand(3, images, device=device)), "rescale": case.rescale}


def _guide(function):
    @torch.no_grad()
    def call(i):
        return function(*i["arguments"], rescale=i["rescale"])

    return call


def _draw_update(case, dtype, device):
    def flat(kind=torch.float32):
        return torch.rand(case.parameters, dtype=kind, device=device)

    numbers = {name: torch.ones((), device=device) for name in ("lr", "step", "grad_scale")}
    options = numbers | {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    options["ema_decays"] = (0.999, 0.99)[: case.tracks]
    options["weights_out"] = None if case.weights is None else flat(case.weights)
    return {"state": (flat(), flat(case.grad), flat(), flat()), "emas": [flat() for _ in options["ema_decays"]]} | {
        "options": options
    }


def _update(function):
    def call(i):
        function(*i["state"], i["emas"], **i["options"])
        return i["state"][0]

    return call


def _draw_gradient(case, dtype, device):
    return {"grad": torch.randn(case.parameters, device=device).to(case.grad)}


def _second(function):
    return lambda i: function(i)[1]


def _sum_of_squares(function):
    return lambda i: function(i["grad"])


def _one_image(case):
    if hasattr(case, "parameters"):
        return replace(case, parameters=min(case.parameters, 2**18))
    if hasattr(case, "queries"):
        return replace(case, images=1, queries=min(case.queries, 1024), keys=min(case.keys, 1024))
    return replace(case, shape=(1, *case.shape[1:]))


def _one_small_map(case):
    """36 x 36 is already cut into several chunks, like every larger map."""
    _, channels, height, width = case.shape
    return replace(case, shape=(1, channels, min(height, 36), min(width, 36)))


def _norm_floor(case, dtype):
    return 5 * torch.Size(case.shape).numel() * dtype.itemsize


def _attention_floor(case, dtype):
    queries, keys = (case.images * length * case.heads * case.width for length in (case.queries, case.keys))
    return (5 * queries + 6 * keys) * dtype.itemsize


def _diffuse_floor(case, dtype):
    return (1 + dtype.itemsize + 4) * torch.Size(case.shape).numel()


def _guided_floor(case, dtype):
    return (2 * dtype.itemsize + 4 + 4) * torch.Size(case.shape).numel()


def _update_floor(case, dtype):
    weights = 0 if case.weights is None else case.weights.itemsize
    return (24 + case.grad.itemsize + 8 * case.tracks + weights) * case.parameters


SUBJECTS = {
    subject.name: subject
    for subject in [
        Subject(
            group_norm_silu,
            _draw_norm,
            _norm(group_norm_silu.group_norm_silu),
            _norm(group_norm_silu.group_norm_silu_reference),
            _norm_floor,
            _one_small_map,
            {
                "in turns": lambda: _norm(_in_turns),
                "eager": lambda: peers.eager_norm,
                "compiled": peers.compiled(peers.eager_norm),
                "apex": peers.apex_norm,
                "liger": peers.liger_norm,
                "channels-last-groupnorm": peers.channels_last_norm,
            },
        ),
        Subject(
            group_norm_silu,
            _draw_norm,
            _norm(_in_turns),
            _norm(group_norm_silu.group_norm_silu_reference),
            _norm_floor,
            _one_small_map,
            label="group_norm_silu in turns",
            covers=_has_turns,
        ),
        Subject(
            attention,
            _draw_attention,
            _attend(attention.attention),
            _attend(attention.attention_reference),
            _attention_floor,
            _one_image,
            {name: peers.backend(name) for name in attention_backends.BACKENDS}
            | {
                "eager": lambda: peers.eager_attention,
                "compiled": peers.compiled(peers.eager_attention),
            },
        ),
        Subject(
            diffuse,
            _draw_diffuse,
            lambda i: diffuse.diffuse(*i["arguments"], dtype=i["dtype"])[1],
            lambda i: diffuse.diffuse_reference(*i["arguments"], dtype=i["dtype"])[1],
            _diffuse_floor,
            _one_image,
            peers={
                "eager": lambda: peers.definition_of_diffuse,
                "eager, torch's noise": lambda: lambda i: peers.diffuse_with_torchs_noise(i)[1],
                "compiled, torch's noise": lambda: _second(peers.compiled(peers.diffuse_with_torchs_noise)()),
            },
        ),
        Subject(
            guided_step,
            _draw_guided,
            _guide(guided_step.guided_step),
            _guide(guided_step.guided_step_reference),
            _guided_floor,
            _one_image,
            peers={
                "eager": lambda: peers.definition_of_guidance,
                "compiled": peers.compiled(peers.definition_of_guidance),
                "diffusers": peers.diffusers_guidance,
            },
        ),
        Subject(
            adamw_ema,
            _draw_update,
            _update(adamw_ema.adamw_ema_),
            _update(adamw_ema.adamw_ema_reference_),
            _update_floor,
            _one_image,
            peers={
                "torch fused + EMA + cast": peers.torch_update,
                "torch fused + diffusers' EMA + cast": peers.diffusers_update,
                "apex FusedAdamSWA": peers.apex_update,
            },
        ),
        Subject(
            squared_norm,
            _draw_gradient,
            _sum_of_squares(squared_norm.squared_norm),
            _sum_of_squares(squared_norm.squared_norm_reference),
            lambda case, dtype: case.grad.itemsize * case.parameters,
            _one_image,
            peers={"torch vector_norm": lambda: peers.torch_squared_norm},
        ),
    ]
}


def launches_of(subject, case, dtype):
    """What one call (and its gradients) would launch, without storage or device."""
    inputs = subject.draw(case, dtype, "meta")
    with recorded() as seen:
        forward_backward(subject.ours, inputs)()
    return seen
