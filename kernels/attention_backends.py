"""Attention kernels of PyTorch and xformers; which is fastest for a shape is measured once, on the device itself.

Shape letters as in attention.py: N images, L query tokens, M key and value tokens, H heads, D channels per head.
"""

import logging
import operator
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from duotone.kernels.dispatch import constant_in_graphs, require


def scaled_dot_product(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
    """PyTorch's attention with the kernel that PyTorch chooses; a row that attends to nothing gives 0."""
    q_NHLD, k_NHMD, v_NHMD = (t.transpose(1, 2) for t in (q_NLHD, k_NMHD, v_NMHD))
    if mask_NM is None:
        return F.scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=scale).transpose(1, 2)
    # Kernels give NaN or a uniform mean to a row that may attend to nothing: let it attend to all keys, then zero it.
    attends_N = mask_NM.any(dim=1)
    mask_N11M = (mask_NM | ~attends_N[:, None])[:, None, None, :]
    out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, attn_mask=mask_N11M, scale=scale)
    return out_NHLD.transpose(1, 2) * attends_N[:, None, None, None].to(out_NHLD.dtype)


def on_a_cpu(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
    """Attend on a CPU in at least fp32: PyTorch's gradient in half precision takes five times as long there."""
    wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q_NLHD, k_NMHD, v_NMHD))
    return scaled_dot_product(*wide, mask_NM, scale).to(q_NLHD.dtype)


def attention_on_meta(q_NLHD, k_NMHD, v_NMHD):
    """Attend on meta tensors with a fused kernel, which keeps for the gradient what a GPU's kernels would.

    PyTorch would choose an unfused one there.
    """
    q_NHLD, k_NHMD, v_NHMD = (t.transpose(1, 2) for t in (q_NLHD, k_NMHD, v_NMHD))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q_NHLD, k_NHMD, v_NHMD)[0].transpose(1, 2)


def _restricted(backend):
    def run(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
        with sdpa_kernel(backend):
            return scaled_dot_product(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale)

    return run


def _xformers(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
    module, reason = xformers()
    if module is None or mask_NM is not None:
        raise RuntimeError(reason or "a padding mask needs an aligned bias for every query and key")
    return module.memory_efficient_attention(q_NLHD, k_NMHD, v_NMHD, scale=scale)


@cache
def xformers():
    """xformers' attention module, or None and the reason why it cannot run here; never imported without CUDA."""
    if not torch.cuda.is_available():
        return None, "xformers needs a CUDA device"
    try:
        logging.getLogger("xformers").setLevel(logging.ERROR)  # a build for another CUDA is reported below
        import xformers.ops

        probe = torch.zeros(1, 16, 1, 16, dtype=torch.float16, device="cuda")
        xformers.ops.memory_efficient_attention(probe, probe, probe)
        return xformers.ops, ""
    except Exception as error:
        return None, f"xformers: {type(error).__name__}: {error}".splitlines()[0]


BACKENDS = {
    "default": scaled_dot_product,
    "flash": _restricted(SDPBackend.FLASH_ATTENTION),
    "efficient": _restricted(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _restricted(SDPBackend.CUDNN_ATTENTION),
    "xformers": _xformers,
}
_choices: dict[tuple, dict] = {}


def by_measurement(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
    """Attend with the backend that was measured fastest for the shape."""
    images, queries, heads, width = q_NLHD.shape
    # operator.index specializes a graph traced for dynamic batch sizes to the size that is measured.
    sizes = (operator.index(size) for size in (images, queries, k_NMHD.shape[1], heads, width))
    backend = _backend(torch.compiler.is_compiling(), q_NLHD.get_device(), *sizes, q_NLHD.dtype, mask_NM is not None)
    return BACKENDS[backend](q_NLHD, k_NMHD, v_NMHD, mask_NM, scale)


def choices() -> list[dict]:
    """Measurements for every shape so far, for JSON: chosen backend, milliseconds, and why the others cannot run."""
    return [{n: str(v) if n == "dtype" else v for n, v in zip(_KEY, key)} | choice for key, choice in _choices.items()]


def choose(backend: str, **shape) -> None:
    """Fix the backend of one shape: images, queries, keys, heads, width, dtype, masked."""
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    _choices[tuple(shape[name] for name in _KEY)] = {"backend": backend, "milliseconds": {}, "refused": {}}


def measured_on() -> str:
    """The device and PyTorch version that `choices` was measured on; the choices are valid nowhere else."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{device}, torch {torch.__version__}"


def keep_choices(rows: list[dict], where: str) -> None:
    """Restore the rows of `choices` measured on `where`, if that is this device and version; others measure again.

    A new measurement might choose another backend, and each sums in its own order.
    """
    if where != measured_on():
        return
    for row in rows:
        if row["backend"] in BACKENDS and (row["backend"] != "xformers" or xformers()[0] is not None):
            key = tuple(getattr(torch, row[n].removeprefix("torch.")) if n == "dtype" else row[n] for n in _KEY)
            _choices[key] = {name: value for name, value in row.items() if name not in _KEY}


_KEY = ("images", "queries", "keys", "heads", "width", "dtype", "masked")


@constant_in_graphs
def _backend(compiling, device_index, *key):
    if key not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return "default"
        _choices[key] = _measure(device_index, *key)
    return backend_to_run(_choices[key], compiling)


def backend_to_run(choice: dict, compiling: bool) -> str:
    """The backend to run: the chosen one, but while compiling not xformers, which breaks graphs (its issue 765).

    The fastest of the others then takes its place.
    """
    others = {name: time for name, time in choice["milliseconds"].items() if name != "xformers"}
    return (
        min(others, key=others.get) if compiling and choice["backend"] == "xformers" and others else choice["backend"]
    )


def _measure(device_index, images, queries, keys, heads, width, dtype, masked):
    """Time forward and backward of every backend on random tensors of this shape and choose the fastest."""
    milliseconds, refused = {}, {}
    for name, run in BACKENDS.items():
        try:
            with warnings.catch_warnings():  # a backend that cannot run warns at length
                warnings.simplefilter("ignore")
                milliseconds[name] = _time(run, device_index, images, queries, keys, heads, width, dtype, masked)
        except Exception as error:  # a failing library loses its place, but must not end the run
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    backend = min(milliseconds, key=milliseconds.get, default="default")
    return {"backend": backend, "milliseconds": milliseconds, "refused": refused}


_HEAD_START = 30_000_000  # cycles, some 15 ms
_ROUNDS = 10


@torch.inference_mode(False)
@torch.enable_grad()
def _time(run, device_index, images, queries, keys, heads, width, dtype, masked):
    device = torch.device("cuda", device_index)

    def draw(length):
        return torch.randn(images, length, heads, width, dtype=dtype, device=device, requires_grad=True)

    # Fork the generator: a run that measures must draw the same numbers afterwards as one that need not.
    with torch.random.fork_rng([device]):
        q_NLHD, k_NMHD, v_NMHD = draw(queries), draw(keys), draw(keys)
    mask_NM = torch.ones(images, keys, dtype=torch.bool, device=device) if masked else None

    def step():
        out_NLHD = run(q_NLHD, k_NMHD, v_NMHD, mask_NM, None)
        torch.autograd.grad(out_NLHD, (q_NLHD, k_NMHD, v_NMHD), out_NLHD.detach())

    with torch.cuda.device(device):
        for _ in range(3):
            step()
        # The host runs ahead while the GPU sleeps here: else launch latency would decide for small shapes.
        torch.cuda._sleep(_HEAD_START)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_ROUNDS):
            step()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / _ROUNDS
