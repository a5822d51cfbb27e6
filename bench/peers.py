"""What the kernels are compared with: PyTorch eager and compiled, and other libraries if they are installed.

A factory returns a function of the subject's inputs, or raises with the reason why there is none here. Libraries are
called through their modules, which choose among their own kernels.
"""

import functools
import importlib

import torch
import torch.nn.functional as F

from duotone.kernels import attention_backends, diffuse, guided_step

PACKAGES = ("xformers", "apex", "liger-kernel", "gnnhwc")
MODULATION = ("add_NC", "scale_NC", "shift_NC")


def compiled(function):
    """Compiles for exactly one case's shapes: after a second one, torch.compile would write slower code for any."""

    def factory():
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return factory


# ------------------------------------------------------------------------------------------------------- group norm


def eager_norm(i):
    """In the image's dtype, as one would write it by hand."""
    x_NCHW, weight, bias = i["x"], i["weight"].to(i["x"].dtype), i["bias"].to(i["x"].dtype)
    if "scale_NC" not in i:
        return F.silu(F.group_norm(x_NCHW, i["groups"], weight, bias))
    add, scale, shift = (i[name].to(x_NCHW.dtype)[:, :, None, None] for name in MODULATION)
    h_NCHW = F.group_norm(x_NCHW + add, i["groups"], weight, bias)
    return F.silu(torch.addcmul(shift, h_NCHW, 1 + scale))


def refuse_modulation(i):
    if "scale_NC" in i:
        raise NotImplementedError("it has no modulation")


def apex_norm():
    group_norm = importlib.import_module("apex.contrib.group_norm").GroupNorm
    made = functools.cache(lambda groups, channels: group_norm(groups, channels, act="silu", device="cuda"))

    def call(i):
        refuse_modulation(i)
        norm = made(i["groups"], i["x"].shape[1])
        if not norm._check_legality(i["x"]):
            raise NotImplementedError(f"its kernels do not list {i['x'].shape[1]} channels, it would call PyTorch")
        return torch.func.functional_call(norm, {"weight": i["weight"], "bias": i["bias"]}, (i["x"],))

    return call


def liger_norm():
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def call(i):
        refuse_modulation(i)
        out_NCHW = function.apply(i["x"], i["weight"], i["bias"], i["x"].shape[1], i["groups"], 1e-5)
        return F.silu(out_NCHW)

    return call


def channels_last_norm():
    try:
        group_norm = importlib.import_module("gnnhwc").GN_NHWC
    except ModuleNotFoundError:
        group_norm = importlib.import_module("gnNHWC.custom_gn").GN_NHWC
    made = functools.cache(lambda groups, channels: group_norm(groups, channels, activation="silu", device="cuda"))

    def call(i):
        refuse_modulation(i)
        norm = made(i["groups"], i["x"].shape[1])
        weights = {name: i[name].to(i["x"].dtype) for name in ("weight", "bias")}
        return torch.func.functional_call(norm, weights, (i["x"],))

    return call


# -------------------------------------------------------------------------------------------------------- attention


def backend(name):
    return lambda: lambda i: attention_backends.BACKENDS[name](i["q"], i["k"], i["v"], i["mask"], None)


_MOST_SCORES = 2**30


def eager_attention(i):
    """Two matrix products and a softmax in the tokens' dtype."""
    (images, queries, heads, _), keys = i["q"].shape, i["k"].shape[1]
    if images * heads * queries * keys > _MOST_SCORES:
        raise NotImplementedError("its scores would take the memory of a GPU")
    q_NHLD, k_NHMD, v_NHMD = (i[name].transpose(1, 2) for name in "qkv")
    score_NHLM = q_NHLD @ k_NHMD.mT * i["q"].shape[-1] ** -0.5
    if i["mask"] is not None:
        score_NHLM = score_NHLM.masked_fill(~i["mask"][:, None, None, :], torch.finfo(score_NHLM.dtype).min)
    return (score_NHLM.softmax(-1) @ v_NHMD).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- diffusion, guidance


def definition_of_diffuse(i):
    return diffuse.diffuse_reference(*i["arguments"], dtype=i["dtype"])[1]


def diffuse_with_torchs_noise(i):
    """The same job with PyTorch's generator: other noise, which does not depend on positions."""
    images_NHWC, flip_N, coefficients_N4, *_ = i["arguments"]
    x0_NHWC = images_NHWC.float() / 127.5 - 1
    x0_NHWC = torch.where(flip_N[:, None, None, None], x0_NHWC.flip(2), x0_NHWC)
    noise_NHWC = torch.randn_like(x0_NHWC)
    a, b, p, q = coefficients_N4[:, :, None, None, None].unbind(dim=1)
    return (a * x0_NHWC + b * noise_NHWC).to(i["dtype"]), (p * x0_NHWC + q * noise_NHWC).permute(0, 3, 1, 2)


@torch.no_grad()
def definition_of_guidance(i):
    return guided_step.guided_step_reference(*i["arguments"], rescale=i["rescale"])


def diffusers_guidance():
    """The lines of diffusers' pipelines, and their function for the rescale."""
    pipeline = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    rescaled = importlib.import_module(pipeline).rescale_noise_cfg

    @torch.no_grad()
    def call(i):
        prediction, x_NCHW, *per_image = i["arguments"]
        c_skip, c_out, scale = (value[:, None, None, None] for value in per_image)
        conditional, unconditional = (c_skip * x_NCHW + c_out * half for half in prediction.chunk(2))
        guided_NCHW = unconditional + scale * (conditional - unconditional)
        return rescaled(guided_NCHW, conditional, i["rescale"]) if i["rescale"] else guided_NCHW

    return call


# ----------------------------------------------------------------------------------------------------------- update


def torch_adamw(i):
    """torch's own fused AdamW, which only takes gradients of the weights' dtype."""
    master, gradient, average, square = i["state"]
    options = i["options"]
    torch._fused_adamw_(
        [master], [gradient.float()], [average], [square], [], [options["step"]],
        lr=options["lr"], beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
        amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip
    return master


def cast(i):
    if i["options"]["weights_out"] is not None:
        i["options"]["weights_out"].copy_(i["state"][0])


def torch_update():
    """Fused AdamW, foreach EMA and cast: three passes, and before them a fourth that casts gradients in bf16."""

    def call(i):
        master = torch_adamw(i)
        for ema, decay in zip(i["emas"], i["options"]["ema_decays"]):
            torch._foreach_lerp_([ema], [master], 1 - decay)
        cast(i)
        return master

    return call


def diffusers_update():
    """torch's fused AdamW, diffusers' EMAModel as its training scripts step it, and the cast."""
    model_of = importlib.import_module("diffusers.training_utils").EMAModel

    def tracking(i):
        for ema, decay in zip(i["emas"], i["options"]["ema_decays"]):
            model = model_of([i["state"][0][:0]], decay=decay, min_decay=decay, foreach=True)
            model.optimization_step, model.shadow_params = 2, [ema]
            yield model

    def call(i):
        master = torch_adamw(i)
        for model in tracking(i):
            model.step([torch.nn.Parameter(master)])  # it averages only what requires a gradient
        cast(i)
        return master

    return call


def apex_update():
    """FusedAdamSWA's kernel with pointers already on the GPU: its step() copies them, which no CUDA graph can replay."""
    module = importlib.import_module("apex.contrib.openfold_triton.fused_adam_swa")
    made = {}

    def prepared(i):
        master, gradient, average, square = i["state"]
        weights = i["options"]["weights_out"]
        if len(i["emas"]) != 1 or weights is None or weights.dtype != gradient.dtype:
            raise NotImplementedError("it takes one track, and weights of the gradients' type")
        optimizer = module.FusedAdamSWA(
            [master], [weights], [i["emas"][0]], swa_decay_rate=i["options"]["ema_decays"][0],
            lr=1.0, weight_decay=0.01, adam_math_mode=module.AdamMathType.ApexAdamW,
        )  # fmt: skip
        optimizer.state[master] = {"exp_avg": average, "exp_avg_sq": square}
        optimizer._build_pointer_buffers()
        (buffers,) = optimizer.pointer_buffer_groups.values()
        pointer = torch.tensor([gradient.data_ptr()], dtype=torch.int64)
        buffers["grad"] = pointer.repeat_interleave(buffers["chunks_per_param"]).to(master.device)
        types = {
            "MODEL_COMPUTE_DTYPE": module._TORCH2DTYPE[weights.dtype],
            "MODEL_STATE_DTYPE": module._TORCH2DTYPE[master.dtype],
        }
        return optimizer, buffers, types

    def call(i):
        key = i["state"][0].data_ptr()
        if key not in made:
            made[key] = prepared(i)
        optimizer, buffers, types = made[key]
        module._multi_tensor_adam_swa[(buffers["total_chunks"],)](
            state_param_ptr_per_chunk=buffers["param_ptr_per_chunk"],
            compute_param_ptr_per_chunk=buffers["compute_param_ptr_per_chunk"],
            swa_param_ptr_per_chunk=buffers["swa_param_ptr_per_chunk"],
            grad_ptr_per_chunk=buffers["grad"],
            moment_ptr_per_chunk=buffers["exp_avg_ptr_per_chunk"],
            velocity_ptr_per_chunk=buffers["exp_avg_sq_ptr_per_chunk"],
            chunk_local_idx_ptr=buffers["chunk_local_idx"],
            chunk_numel_ptr=buffers["chunk_numel"],
            grad_clip_scale_ptr=buffers["default_grad_clip_scale"],
            lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01,
            beta1_correction=1 - 0.9, beta2_correction=1 - 0.999,
            swa_decay_rate=optimizer.swa_decay_rate, swa_n_averaged=1,
            adam_math_mode=optimizer.adam_math_mode.value, **types,
            CHUNK_SIZE=module.CHUNK_SIZE.item(), BLOCK_SIZE=128, num_warps=1,
        )  # fmt: skip
        return i["state"][0]

    return call


def torch_squared_norm(i):
    return torch.linalg.vector_norm(i["grad"], dtype=torch.float32).square()
