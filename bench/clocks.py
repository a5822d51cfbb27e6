"""Timing in interleaved rounds, and the two ceilings of a process: how fast it copies and multiplies matrices.

On a GPU, events around CUDA graph replays are timed, with the L2 cache flushed before each. On a CPU, processor time is
taken, which other processes disturb far less than wall-clock time; with several threads it is the sum over them.
"""

import resource
import statistics
import time

import torch


def time_interleaved(contenders: dict, rounds: int = 30) -> dict[str, list[float]]:
    """Milliseconds of each contender in every round; they take turns, with the L2 cache flushed before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    runs = {name: _captured(call) for name, call in contenders.items()}
    milliseconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            milliseconds[name].append(begin.elapsed_time(end))
    return milliseconds


def _captured(call):
    """The call as a CUDA graph replay, so that no contender's time includes launch latency on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rounds_on_cpu(contenders: dict, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each contender in every round, in turns; the first round is a warm-up."""
    milliseconds = {name: [] for name in contenders}
    for round in range(rounds + 1):
        for name, call in contenders.items():
            began = time.process_time()
            call()
            if round:
                milliseconds[name].append(1e3 * (time.process_time() - began))
    return milliseconds


def interleaved(contenders: dict, rounds: int, device: str) -> dict[str, list[float]]:
    return time_interleaved(contenders, rounds) if device == "cuda" else rounds_on_cpu(contenders, rounds)


def copy_bandwidth() -> float:
    """Gigabytes per second, read plus written, of the faster of two copies: the driver's, and a kernel's.

    The driver's copy alone is no ceiling: in a graph on an H200 it moved 2.7 TB/s, one of our kernels 3.8.
    """
    source = torch.zeros(2**28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.bitwise_not(source, out=target)}
    fastest = min(statistics.median(times) for times in time_interleaved(ways).values())
    return 2 * source.nbytes / fastest / 1e6


def copy_bandwidth_on_cpu() -> float:
    """Gigabytes per second of processor time, read plus written, of a copy larger than any cache."""
    source = torch.zeros(2**26, dtype=torch.uint8)
    target = torch.zeros_like(source)
    milliseconds = rounds_on_cpu({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * source.numel() / statistics.median(milliseconds) / 1e6


def matmul_rate(device: str) -> float:
    """TFLOP/s of a square matrix product, bf16 on a GPU and fp32 on a CPU: the peak that shares are relative to."""
    # A core is fastest while all three matrices fit in its cache: larger ones would make the ceiling too low.
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (384, torch.float32)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = interleaved({"matmul": lambda: torch.mm(a, b, out=out)}, 30, device)["matmul"]
    return 2 * side**3 / statistics.median(milliseconds) / 1e9


def time_on_cpu(call, rounds: int = 5) -> float:
    """Milliseconds of the fastest of a few calls on one core: the call that a busy machine disturbed least."""
    torch.set_num_threads(1)
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def core_seconds_of_children() -> float:
    """Processor time, in seconds, of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
