"""What torch.compile would launch on a GPU, without one: the code that Inductor writes for a block, launch by launch.

    python bench/gpu_code.py                     # blocks of the reference network, and diffusers' own, counted
    python bench/gpu_code.py --case text_8       # one of them, launch by launch

A block is traced on the CPU with the kernels that a GPU would run, differentiated and partitioned; each graph is then
moved to a CUDA device that exists in name only and lowered for it. Nothing is run, and no time is claimed: the result
shows which launches there are, and whether any of them merely fills or copies a feature map.
"""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from record import RESULTS, command, machine, refuse, refuse_unwritable, table, write_json
from triton.backends.compiler import GPUTarget

from duotone.data.refusal import Refused

# In a build with CUDA, kernels show torch.compile what they launch; whether this is one, they ask when they are imported.
with mock.patch.object(torch.backends.cuda, "is_built", lambda: True):
    from networks import diffusers

    from duotone.engine.model.blocks import ResBlock, Transformer
    from duotone.kernels import attention, attention_backends, group_norm_silu

READS = "2.13"
"""The version of torch whose compiler this knows; another's has other insides."""
DEVICE = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, gcnArchName="",
    shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20,
)  # fmt: skip


class Written(Exception):
    """Raised to end a compilation once its code is written, before anything is built or run."""


class Driver:
    """What Triton asks of a driver before it compiles."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: DEVICE)
    get_device_interface = staticmethod(lambda: torch.cuda)


@contextlib.contextmanager
def a_gpu_in_name():
    """Everything that Inductor asks of a CUDA device while it writes code, answered as an H100 would."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._subclasses import fake_tensor

    with contextlib.ExitStack() as stack:
        answers = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_properties": lambda *_: H100, "get_device_capability": lambda *_: (9, 0),
            "_lazy_init": lambda: None, "_exchange_device": lambda *_: 0, "_maybe_exchange_device": lambda *_: 0,
            "synchronize": lambda *_: None, "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
            "_get_device_properties": lambda *_: H100, "set_rng_state": lambda *_: None,
            "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        }  # fmt: skip
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        for name, answer in {"get_device_properties": lambda *_: H100, "get_compute_capability": lambda *_: 90}.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        # These trace example patterns on a real device; none of them concerns a block's own operators.
        for module, name in (
            (fuse_attention, "_sfdp_init"),
            (pad_mm, "_pad_mm_init"),
            (misc_patterns, "_misc_patterns_init"),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda *_, **__: None))
        stack.enter_context(cudnn_in_name())
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda: True))
        stack.enter_context(config.patch(joint_graph_constant_folding=False, fx_graph_cache=False))
        stack.enter_context(a_driver_in_name())
        yield


@contextlib.contextmanager
def cudnn_in_name():
    """Makes convolutions keep the layout of their image or weight, as cuDNN's do; this build's own would use NCHW."""

    def layout(image, weight, *_):
        is_last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (image, weight))
        return torch.channels_last if is_last else torch.contiguous_format

    with (
        mock.patch.object(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", layout),
    ):
        yield


def a_driver_in_name():
    """Enough of a driver for Triton to lower a kernel, from which torch.compile reads which arguments it writes to."""
    return mock.patch.object(triton.runtime.driver, "_active", Driver())


# -------------------------------------------------------------------------------------------------------- two graphs


def graphs_of(module, inputs) -> list[torch.fx.GraphModule]:
    """The forward and the backward graph of one call, compiled with fullgraph and our kernels; nothing is computed."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(lambda *_: [zeros_of(value) for value in outputs_of(graph)])

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    torch._dynamo.reset()
    with a_driver_in_name(), contextlib.ExitStack() as stack:
        for kernel in (group_norm_silu, attention):
            stack.enter_context(mock.patch.object(kernel, "runs_kernel", lambda *_: True))
        # On a CPU, long attention runs in fp32; to trace a GPU's, PyTorch's operator runs in the input's dtype.
        stack.enter_context(mock.patch.object(attention_backends, "on_a_cpu", attention_backends.scaled_dot_product))
        out = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
        out.sum().backward()
    return graphs


def outputs_of(graph) -> list:
    (result,) = next(node for node in reversed(graph.graph.nodes) if node.op == "output").args
    return [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in result]


def zeros_of(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


def moved(graph) -> tuple[torch.fx.GraphModule, list]:
    """The graph and its inputs on the device that exists in name only."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        node.kwargs = {k: DEVICE if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        node.args = tuple(DEVICE if isinstance(v, torch.device) else v for v in node.args)
    mode = FakeTensorMode()
    with mode:
        inputs = [on_device(node.meta["val"]) for node in graph.graph.nodes if node.op == "placeholder"]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return graph, inputs


def on_device(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


# ----------------------------------------------------------------------------------------------------------- the code


@dataclass(frozen=True)
class Launch:
    """One launch of the generated code: who wrote its kernel, and the bytes of the tensors that it reads and writes."""

    name: str
    kind: str  # ours, library, fused (Inductor's own), fill (Inductor's own, reading nothing) or eager (not compiled)
    bytes: int


def launches_of(module, inputs) -> dict[str, list[Launch]]:
    """What the compiled module launches in its forward and its backward pass."""
    graphs = graphs_of(module, inputs)
    with a_gpu_in_name():
        return {name: compiled(graph, name) for name, graph in zip(("forward", "backward"), graphs, strict=True)}


def compiled(graph, which: str) -> list[Launch]:
    """Launches of the code that Inductor writes for one graph."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    found = []

    def write(lowering):
        lowering.codegen()
        found.append([launch_of(node) for node in lowering.scheduler.nodes if is_launch(node)])
        raise Written

    graph, inputs = moved(graph)
    context = torch._guards.TracingContext(next(t for t in inputs if isinstance(t, torch.Tensor)).fake_mode)
    with mock.patch.object(GraphLowering, "_compile_to_module", write), torch._guards.tracing(context):
        try:
            compile_fx.compile_fx_inner(graph, inputs, is_backward=which == "backward")
        except Exception:
            if not found:
                raise
    return found[0]


def is_launch(node) -> bool:
    """False for nodes that only allocate, or only name one of a launch's several results."""
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return False
    return not isinstance(node.node, ir.MultiOutput)


def launch_of(node) -> Launch:
    from torch._inductor import ir

    if isinstance(node.node, ir.UserDefinedTritonKernel):
        # Each argument once: Inductor counts what a kernel writes as read, too.
        arguments = {value.get_name(): value for value in node.node.inputs}.values()
        size = sum(int(value.get_numel()) * value.get_dtype().itemsize for value in arguments)
        return Launch(node.node.get_kernel_and_metadata()[0].__name__, "ours", size)
    moved_bytes = int(node.get_read_write_buffers_sizes())
    if isinstance(node.node, ir.ExternKernel):
        return Launch(node.node.python_kernel_name.split(".")[-1], "library", moved_bytes)
    parts = node.get_nodes()
    names = dict.fromkeys(
        o.target.__name__.split(".")[0] for part in parts for o in part.node.get_origins() if callable(o.target)
    )
    reads = {d.name for d in node.read_writes.reads} - {d.name for d in node.read_writes.writes}
    return Launch(" + ".join(names), "fused" if reads else "fill", moved_bytes)


# ------------------------------------------------------------------------------------------------------------ blocks


class Block:
    """One block of the network, and the implementations that it is compared with."""

    def contenders(self) -> dict[str, torch.nn.Module]:
        return {"diffusers": self.theirs(), "ours": self.ours()}

    def inputs_of(self, who: str, images: int) -> tuple:
        return self.inputs(images)

    def outside(self, who: str, images: int) -> dict[str, list[Launch]]:
        """Launches around the compiled code that it makes necessary."""
        return {"forward": [], "backward": []}


def image(images: int, channels: int, side: int) -> torch.Tensor:
    blank_NCHW = torch.zeros(images, channels, side, side, dtype=torch.bfloat16)
    return blank_NCHW.to(memory_format=torch.channels_last).requires_grad_()


@dataclass(frozen=True)
class Residual(Block):
    """A residual block of the reference network; where a skip was joined, its input is wider than its output."""

    width: int
    out_width: int
    side: int

    def ours(self, in_turns: bool = False, joins_skips: bool = False) -> torch.nn.Module:
        block = ResBlock(
            self.width, self.out_width, EMBEDDING, groups=32, eps=1e-5, film=False, shared=False, dropout=0.0
        )
        block.norm1.in_turns = block.norm2.in_turns = in_turns
        block.norm1.joins_skips = joins_skips
        return block

    def theirs(self) -> torch.nn.Module:
        diffusers()
        from diffusers.models.resnet import ResnetBlock2D

        return ResnetBlock2D(
            in_channels=self.width, out_channels=self.out_width, temb_channels=EMBEDDING, groups=32, eps=1e-5
        )

    def inputs(self, images: int) -> tuple:
        return image(images, self.width, self.side), torch.zeros(images, EMBEDDING, dtype=torch.bfloat16)

    def contenders(self) -> dict[str, torch.nn.Module]:
        return {"diffusers": self.theirs(), "ours": self.ours(), "ours, norms in turns": self.ours(in_turns=True)}


@dataclass(frozen=True)
class Up(Block):
    """A residual block on the way up: its inputs x and a skip are joined before the compiled block or within it."""

    width: int
    skip_width: int
    out_width: int
    side: int

    @property
    def residual(self) -> Residual:
        return Residual(self.width + self.skip_width, self.out_width, self.side)

    def contenders(self) -> dict[str, torch.nn.Module]:
        return {
            "diffusers": self.residual.theirs(),
            "ours, joined outside": self.residual.ours(),
            "ours": self.residual.ours(),
            "ours, norms join skips": self.residual.ours(joins_skips=True),
            "ours, norms in turns": self.residual.ours(in_turns=True),
            "ours, norms in turns join skips": self.residual.ours(in_turns=True, joins_skips=True),
        }

    def is_joined_outside(self, who: str) -> bool:
        return who in ("diffusers", "ours, joined outside")

    def inputs_of(self, who: str, images: int) -> tuple:
        joined_NCHW, embedding_NE = self.residual.inputs(images)
        if self.is_joined_outside(who):
            return joined_NCHW, embedding_NE
        return image(images, self.width, self.side), embedding_NE, image(images, self.skip_width, self.side)

    def outside(self, who: str, images: int) -> dict[str, list[Launch]]:
        """The concatenation, and the copy of x's gradient: it is a slice, which compiled code needs dense.

        The skip's gradient is a slice as well, but needs no copy, as it is added to another gradient anyway.
        """
        if not self.is_joined_outside(who):
            return super().outside(who, images)
        joined_NCHW, x_NCHW = (image(images, width, self.side) for width in (self.residual.width, self.width))
        return {
            "forward": [Launch("cat", "eager", 2 * joined_NCHW.nbytes)],
            "backward": [Launch("copy_", "eager", 2 * x_NCHW.nbytes)],
        }


@dataclass(frozen=True)
class Text(Block):
    """Self-attention among the pixels of a feature map, and their cross-attention to 77 words."""

    width: int
    heads: int
    side: int

    def ours(self) -> torch.nn.Module:
        return Transformer(self.width, self.heads, context_width=EMBEDDING, depth=1, groups=32, linear=False)

    def theirs(self) -> torch.nn.Module:
        return TheirTransformer(self)

    def inputs(self, images: int) -> tuple:
        return image(images, self.width, self.side), torch.zeros(images, 77, EMBEDDING, dtype=torch.bfloat16)


class TheirTransformer(torch.nn.Module):
    """diffusers' block, called as ours is."""

    def __init__(self, text: Text):
        super().__init__()
        self.block = diffusers().Transformer2DModel(
            num_attention_heads=text.heads, attention_head_dim=text.width // text.heads, in_channels=text.width,
            cross_attention_dim=EMBEDDING, norm_num_groups=32,
        )  # fmt: skip

    def forward(self, x_NCHW, tokens_NMD):
        return self.block(x_NCHW, encoder_hidden_states=tokens_NMD, return_dict=False)[0]


EMBEDDING = 512
CASES = {
    "residual_128": Residual(128, 128, 128),
    "residual_128_after_skip": Residual(256, 128, 128),
    "residual_32": Residual(256, 256, 32),
    "up_128": Up(128, 128, 128, 128),
    "up_32": Up(384, 256, 256, 32),
    "text_16": Text(384, 4, 16),
    "text_8": Text(384, 4, 8),
}


# -------------------------------------------------------------------------------------------------------------- table


def measure(name: str, images: int, show: bool) -> list[dict]:
    """One row for each contender; with `show`, prints its launches too."""
    rows = []
    case = CASES[name]
    for who, block in case.contenders().items():
        block = block.bfloat16().to(memory_format=torch.channels_last)
        passes = launches_of(block, case.inputs_of(who, images))
        passes = {which: case.outside(who, images)[which] + passes[which] for which in passes}
        if show:
            print(
                f"\n{name}, {who}\n" + table([{"pass": which} | vars(row) for which in passes for row in passes[which]])
            )
        launches = {which: [vars(launch) for launch in passes[which]] for which in passes}
        rows.append({"block": name, "who": who, "images": images} | totals(passes) | {"launches": launches})
    return rows


def totals(passes: dict[str, list[Launch]]) -> dict:
    every = [row for rows in passes.values() for row in rows]
    found = {f"{which}_launches": len(rows) for which, rows in passes.items()}
    found |= {f"{which}_mebibytes": round(sum(r.bytes for r in rows) / 2**20, 2) for which, rows in passes.items()}
    found["fills_mebibytes"] = round(sum(row.bytes for row in every if row.kind == "fill") / 2**20, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one block, launch by launch")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/gpu_code.json)")
    asked = parser.parse_args()
    if asked.images < 1:
        refuse(f"--images {asked.images}: it must be at least 1")
    names = [asked.case] if asked.case else list(CASES)
    path = asked.json or (None if asked.case else RESULTS / "gpu_code.json")
    if path:
        refuse_unwritable(path)
    if not torch.__version__.startswith(f"{READS}."):
        refuse(f"torch {torch.__version__}: this reads what the compiler of torch {READS} writes; install that version")
    try:
        rows = [row for name in names for row in measure(name, asked.images, bool(asked.case))]
    except Refused as refusal:
        refuse(str(refusal))
    print("\n" + table([{name: value for name, value in row.items() if name != "launches"} for row in rows]))
    if path:
        write_json(path, {"machine": machine(), "command": command(), "written_for": H100.name, "results": rows})
        print(f"written: {path}")


if __name__ == "__main__":
    main()
