"""Start-up check: compares one small call of every kernel with its definition and switches off kernels that disagree.

Compilers have silently produced wrong gradients for exactly these shapes. A wrong kernel costs a run, this a second.
"""

import functools
import itertools

import torch

from duotone.kernels import adamw_ema, attention, diffuse, dispatch, group_norm_silu, guided_step, squared_norm

_ALLOWED = 0.02


@torch.inference_mode(False)
@torch.enable_grad()
def self_test(device, in_turns: bool = False, joins_skips: bool = False) -> list[str]:
    """One line per kernel that was switched off, with the reason; empty if all agree or none can run on `device`.

    With `in_turns` and `joins_skips`, norms of large maps in turns and norms that join skips are checked as well.
    """
    lines = []
    check_norms = functools.partial(_check_group_norm_silu, in_turns=in_turns, joins_skips=joins_skips)
    checks = _CHECKS | {group_norm_silu.NAME: check_norms}
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        for name, check in checks.items():
            if dispatch.runs_kernel(name, torch.empty(0, device=device)):
                reason = _reason(check, device)
                if reason:
                    dispatch.disable(name, reason)
                    lines.append(f"{name}: {reason}; its reference runs instead")
    return lines


@functools.cache
def checked_once(device, in_turns: bool = False, joins_skips: bool = False) -> list[str]:
    """The same, run once per process, as every model that is loaded asks for it."""
    return self_test(device, in_turns, joins_skips)


def _reason(check, device):
    """The reason why a kernel cannot be trusted, or None."""
    try:
        for what, mine, truth in check(device):
            error = _difference(mine, truth)
            if not error <= _ALLOWED:
                return f"{what} differs from its definition by {error:.2g} of its size"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _difference(mine, truth):
    mine, truth = mine.detach().double(), truth.detach().double()
    return float((mine - truth).norm() / truth.norm().clamp(min=1e-12))


def _with_gradients(function, reference, inputs, gradient):
    """The output and the gradient of every input, from the kernel and from its definition in fp64."""
    results = []
    for run, dtype in ((function, None), (reference, torch.float64)):
        leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in inputs.values()]
        out = run(**dict(zip(inputs, leaves)))
        results.append((out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))))
    names = ["output", *(f"the gradient of {name}" for name in inputs)]
    return zip(names, *results)


def _check_group_norm_silu(device, in_turns=False, joins_skips=False):
    """Four channels per group in bf16 with every modulation, once on chip and once in chunks."""
    ways = [(_norm, _norm_reference), *([(_joined_norm, _joined_norm_reference)] if joins_skips else [])]
    sizes = [(8, False), (40, False), *([(40, True)] if in_turns else [])]
    for (norm, reference), (side, turns) in itertools.product(ways, sizes):
        x_NCHW = torch.randn(2, 64, side, side, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
        inputs = {
            "x_NCHW": x_NCHW,
            "weight_C": torch.randn(64, device=device),
            "bias_C": torch.randn(64, device=device),
        }
        inputs |= {name: torch.randn(2, 64, device=device) for name in ("shift_NC", "scale_NC", "add_NC")}
        yield from _with_gradients(
            functools.partial(norm, in_turns=turns),
            reference,
            inputs,
            torch.randn_like(x_NCHW),
        )


def _norm(in_turns, **inputs):
    return group_norm_silu.group_norm_silu(**inputs, groups=16, in_turns=in_turns)


def _norm_reference(**inputs):
    return group_norm_silu.group_norm_silu_reference(**inputs, groups=16)


def _joined_norm(in_turns, x_NCHW, **inputs):
    """The image in two parts whose border cuts through a group; the two results are added into one."""
    parts = [part.contiguous(memory_format=torch.channels_last) for part in x_NCHW.tensor_split([22], dim=1)]
    return sum(group_norm_silu.joined_group_norm_silu(*parts, **inputs, groups=16, in_turns=in_turns))


def _joined_norm_reference(x_NCHW, **inputs):
    return _norm_reference(x_NCHW=x_NCHW, **inputs) + x_NCHW


def _check_attention(device):
    """Masked keys: 77 of 64 channels, and 128 of 96."""
    for keys, width in ((77, 64), (128, 96)):
        mask_NM = torch.arange(keys, device=device) < torch.tensor([[keys // 2], [keys]], device=device)
        lengths = {"q_NLHD": 100, "k_NMHD": keys, "v_NMHD": keys}
        inputs = {name: torch.randn(2, n, 2, width, device=device).bfloat16() for name, n in lengths.items()}
        yield from _with_gradients(
            lambda mask_NM=mask_NM, **i: attention.attention(**i, mask_NM=mask_NM),
            lambda mask_NM=mask_NM, **i: attention.attention_reference(**i, mask_NM=mask_NM),
            inputs,
            torch.randn_like(inputs["q_NLHD"]),
        )


def _check_diffuse(device):
    images_NHWC = torch.randint(0, 256, (2, 9, 7, 3), dtype=torch.uint8)
    given = (images_NHWC, torch.tensor([True, False]), torch.rand(2, 4), 2**40 + 3, torch.tensor([5, 2**33]), 1)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in given]
    truths = diffuse.diffuse_reference(*given)
    return [
        (what, mine.cpu(), truth) for what, mine, truth in zip(("input", "target"), diffuse.diffuse(*moved), truths)
    ]


def _check_guided_step(device):
    for rescale in (0.0, 0.7):
        prediction, x_NCHW = (torch.randn(n, 3, 40, 40, device=device) for n in (4, 2))
        per_image = torch.rand(3, 2, device=device).unbind()
        mine = guided_step.guided_step(prediction, x_NCHW, *per_image, rescale=rescale)
        yield "output", mine, guided_step.guided_step_reference(prediction, x_NCHW, *per_image, rescale=rescale)


def _check_adamw_ema(device):
    """As training calls it: gradients and weights in bf16, numbers on the device."""
    numbers = {name: torch.full((), value, device=device) for name, value in {"lr": 1e-3, "step": 3.0, "grad_scale": 0.5}.items()}  # fmt: skip
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decays": (0.9,)}
    mine = [torch.rand(3000, device=device) for _ in range(5)]
    mine[1] = mine[1].bfloat16()
    truth = [value.clone() for value in mine]
    before, weights, true_weights = mine[0].clone(), *(torch.zeros_like(mine[1]) for _ in range(2))
    adamw_ema.adamw_ema_(*mine[:4], mine[4:], **options, **numbers, weights_out=weights)
    plain = {name: value.item() for name, value in numbers.items()}
    adamw_ema.adamw_ema_reference_(*truth[:4], truth[4:], **options, **plain, weights_out=true_weights)
    yield "the update", mine[0] - before, truth[0] - before
    yield from zip(("exp_avg", "exp_avg_sq", "ema", "weights"), [*mine[2:], weights], [*truth[2:], true_weights])


def _check_squared_norm(device):
    grad_P = torch.randn(20_011, device=device).bfloat16()
    yield "the sum", squared_norm.squared_norm(grad_P), squared_norm.squared_norm_reference(grad_P)


_CHECKS = {
    group_norm_silu.NAME: _check_group_norm_silu,
    attention.NAME: _check_attention,
    diffuse.NAME: _check_diffuse,
    guided_step.NAME: _check_guided_step,
    adamw_ema.NAME: _check_adamw_ema,
    squared_norm.NAME: _check_squared_norm,
}
