"""A function of tensors as a CUDA graph: recorded once for its shapes, then replayed in one launch."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Recorded:
    """function(*tensors) for tensors of fixed shapes; the result lives in the graph's memory until the next call."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.device = self.inputs[0].device
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.warm_up(function)
            self.record(function)

    def warm_up(self, function: Callable[..., Tensor]) -> None:
        """Runs the function first, since whatever it compiles, measures or chooses on first use cannot be recorded."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)

    def record(self, function: Callable[..., Tensor]) -> None:
        before, own = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            # Thread-local, since the thread that reads batches may allocate device memory meanwhile.
            with torch.cuda.graph(self.graph, stream=own, capture_error_mode="thread_local"):
                self.output = function(*self.inputs)
        except BaseException:
            put_right(before, self.device)
            raise

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.output


def put_right(stream: torch.cuda.Stream, device: torch.device) -> None:
    """Undoes what torch.cuda.graph leaves behind when recording fails.

    Work would stay on a stream that the thread reading batches does not wait for, and the random generator would still
    take itself to be recording. The generator starts again from its seed.
    """
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[device.index]
    seed = generator.initial_seed()
    generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
    generator.manual_seed(seed)


class Recordings:
    """Calls a function, or replays its recording: one for each key, made at the first call."""

    def __init__(self, *, recording: bool):
        self.recording = recording
        self.recorded: dict[Hashable, Recorded] = {}

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not self.recording:
            return function(*inputs)
        if key not in self.recorded:
            self.recorded[key] = Recorded(function, inputs)
        return self.recorded[key](*inputs)
