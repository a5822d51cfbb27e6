"""Clocks: interleaved rounds, and the two ceilings of a process, how fast it copies and how fast it multiplies.

On a GPU: events around graph replays, the level-2 cache emptied before each. On a CPU: processor time, which a busy
neighbour disturbs far less than the wall clock; with several threads it is the sum over them.
"""

import resource
import statistics
import time

import torch


def time_interleaved(contenders: dict, rounds: int = 30) -> dict[str, list[float]]:
    """Milliseconds of each contender, one after another in every round, the level-2 cache emptied before each."""
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
    """The call as a graph replay, so that launch latency on the host is in nobody's time."""
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
    """Milliseconds of processor time of each contender, one after another in every round, after one round unseen."""
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

    A graph's own copy moved 2.7 TB/s on an H200 where one of our kernels, in the same minute, moved 3.8.
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
    """Teraflops per second of a square product, bf16 on a GPU and fp32 on a CPU: what a share of the peak is taken of."""
    # A core is fastest while all three matrices lie in its cache: larger ones would make the ceiling too low.
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (384, torch.float32)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = interleaved({"matmul": lambda: torch.mm(a, b, out=out)}, 30, device)["matmul"]
    return 2 * side**3 / statistics.median(milliseconds) / 1e9


def time_on_cpu(call, rounds: int = 5) -> float:
    """Milliseconds of the fastest of a few calls on one core, which a busy machine disturbs least."""
    torch.set_num_threads(1)
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def core_seconds_of_children() -> float:
    """In which processes that this one started, and that have ended, had a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
