"""The performance promised for a data-centre GPU, as ratios of times from one run of bench/throughput.py."""

from collections import Counter
from functools import cache

import torch
from networks import REFERENCE, SIZES

from duotone.engine.model.blocks import GroupNormSiLU
from duotone.kernels import group_norm_silu


def timed(results) -> list[dict]:
    return [result for result in results if "milliseconds" in result]


def backward_median(result, name):
    """Milliseconds of the backward pass: the median of both passes minus that of forward, from the same rounds."""
    forward = result["forward_milliseconds"].get(name)
    return forward and result["milliseconds"][name]["median"] - forward["median"]


def bars(results, ceiling) -> list[dict]:
    """The promised ratios beside those of this run; a bar whose cases did not run has no row."""
    rows = [_norm_bar(results, ceiling)]
    rows += [_norm_ratio(results, "compiled", 2.5), _norm_ratio(results, "apex", 1.4)]
    words = [r for r in _of(results, "attention") if "words" in r["case"] and backward_median(r, "ours")]
    others = [r for r in _of(results, "attention") if "words" not in r["case"]]
    if words:
        rows.append(
            _bar("attention, backward over 77 keys, times the best peer", min(map(_backward_ratio, words)), 2.0)
        )
    if others:
        rows.append(_bar("attention elsewhere, times the best peer", min(map(_ratio, others)), 0.98))
    updates = [r["gigabytes_per_second"]["ours"] / ceiling for r in _of(results, "adamw_ema")]
    if updates:
        rows.append(_bar("adamw_ema, share of copy bandwidth", min(updates), 0.9))
    return [row for row in rows if row]


def _of(results, kernel):
    return [result for result in timed(results) if result["kernel"] == kernel]


def _network_norms(results) -> list[tuple[dict, int]]:
    """The timed results for shapes of the reference network, each with how often one step runs that shape."""
    shapes = {case.name: case.shape[1:] for case in group_norm_silu.CASES}
    norms = [r for r in _of(results, "group_norm_silu") if r["case"].startswith(("level_", "skip_"))]
    return [(result, norms_of_the_network()[shapes[result["case"]]]) for result in norms]


@cache
def norms_of_the_network() -> Counter:
    """How many group norms the reference network has of each (C, H, W)."""
    met = Counter()

    def meet(norm, inputs):
        met[tuple(inputs[0].shape[1:])] += 1

    size = SIZES["reference"]
    with torch.device("meta"):
        network = REFERENCE.build()
        for norm in (m for m in network.modules() if isinstance(m, GroupNormSiLU)):
            norm.register_forward_pre_hook(meet)
        tokens_NMD = torch.empty(1, 1, REFERENCE.context_width)
        network(torch.empty(1, REFERENCE.in_channels, size, size), torch.empty(1), None, tokens_NMD)
    return met


def _norm_bar(results, ceiling):
    norms = _network_norms(results)
    ideal = sum(calls * r["floor_bytes"] for r, calls in norms) / ceiling / 1e6
    found = sum(calls * r["milliseconds"]["ours"]["median"] for r, calls in norms)
    return _bar("group_norm_silu, times the ideal bytes", found / ideal, 1.25, at_most=True) if norms else None


def _norm_ratio(results, peer, wanted):
    both = [(r["milliseconds"], calls) for r, calls in _network_norms(results) if peer in r["milliseconds"]]
    found = [sum(calls * times[name]["median"] for times, calls in both) for name in (peer, "ours")]
    return _bar(f"group_norm_silu, times {peer} ({len(both)} shapes)", found[0] / found[1], wanted) if both else None


def _ratio(result):
    """The fastest peer's time over ours."""
    times = {name: time["median"] for name, time in result["milliseconds"].items()}
    ours = times.pop("ours")
    return min(times.values(), default=ours) / ours


def _backward_ratio(result):
    times = {name: backward_median(result, name) for name in result["milliseconds"]}
    ours = times.pop("ours")
    return min(times.values(), default=ours) / ours


def _bar(what, found, wanted, at_most=False):
    holds = found <= wanted if at_most else found >= wanted
    return {"bar": what, "found": found, "wanted": f"{'<=' if at_most else '>='} {wanted}", "holds": holds}
