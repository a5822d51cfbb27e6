"""Damaged shards: every sample is delivered unchanged or counted, or the shard is refused; none is lost silently.

`pytest -m long tests/data/test_fuzz.py` runs 100,000 mutants; the ordinary run takes a sample of them.
"""

import os
import random
from collections import Counter

import numpy as np
import pytest

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.tar_index import index_path, open_index

SAMPLES = 6
FEW, MANY = 400, 50_000


def truncate(raw, rng):
    return raw[: rng.randrange(len(raw))]


def flip_bit(raw, rng):
    place = rng.randrange(len(raw))
    raw[place] ^= 1 << rng.randrange(8)
    return raw


def zero_block(raw, rng):
    start = rng.randrange(len(raw) // 512) * 512
    raw[start : start + 512] = bytes(512)
    return raw


def delete_block(raw, rng):
    start = rng.randrange(len(raw) // 512) * 512
    del raw[start : start + 512]
    return raw


def repeat_block(raw, rng):
    start = rng.randrange(len(raw) // 512) * 512
    raw[start:start] = raw[start : start + 512]
    return raw


def garbage(raw, rng):
    start = rng.randrange(len(raw))
    length = min(rng.choice([4, 64, 4096]), len(raw) - start)
    raw[start : start + length] = rng.randbytes(length)
    return raw


def header_field(raw, rng):
    """Changes a value in a header and corrects its checksum, so that only the value's meaning can give it away."""
    headers = [at for at in range(0, len(raw) - 512, 512) if raw[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    start, length = rng.choice([(0, 20), (124, 12), (156, 1), (345, 10), (257, 8)])
    raw[at + start : at + start + length] = rng.choice([bytes(length), b"7" * length, rng.randbytes(length)])
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    return raw


SAME_SIZE = [flip_bit, zero_block, garbage, header_field]
MUTATORS = [*SAME_SIZE, truncate, delete_block, repeat_block]


@pytest.fixture(scope="module")
def original(tmp_path_factory, members_of, write_tar):
    return write_tar(tmp_path_factory.mktemp("fuzz") / "s" / "0.tar", members_of(SAMPLES)).read_bytes()


def read_all(folder, cpu, plan_for):
    dataset = Shards(shards=folder, size=32, decoder="pillow", on_bad="replace", threads=1).open(cpu, True)
    try:
        return dataset, dataset.read(plan_for(range(dataset.count)))
    finally:
        dataset.close()


def mutants(original, count, mutators, seed):
    rng = random.Random(seed)
    for _ in range(count):
        mutate = rng.choice(mutators)
        yield mutate.__name__, bytes(mutate(bytearray(original), rng))


def check_foreign(folder, original, count, cpu, plan_for):
    """Without an index, only the tar counts: keys may only be lost with a refusal, and texts stay with their images."""
    outcomes, shard = Counter(), folder / "0.tar"
    for name, raw in mutants(original, count, MUTATORS, seed=0):
        index_path(shard).unlink(missing_ok=True)
        shard.write_bytes(raw)
        try:
            dataset, batch = read_all(folder, cpu, plan_for)
        except Refused as refused:
            assert "\n" not in str(refused)
            outcomes["refused"] += 1
            continue
        replaced = {line.partition(":")[0] for line in batch.skipped}
        if name != "header_field":  # it can rename a sample, which no reader could notice
            assert dataset.keys == [f"{number:05d}" for number in range(SAMPLES)], name
        for planned, key, caption in zip(dataset.keys, batch.keys, batch.captions):
            assert (key == planned) != (planned in replaced), name
            assert caption.encode() in texts_of(raw, dataset, dataset.keys.index(key)), name
        outcomes["counted" if replaced else "whole"] += 1
    return outcomes


def texts_of(raw, dataset, sample):
    """The bytes of one sample's own text members, even if damage has put others elsewhere."""
    at = {name: int(column[sample]) for name, column in dataset.columns.items()}
    return b"\n".join(raw[at[f"{part}_offset"] :][: at[f"{part}_size"]] for part in ("txt", "json"))


def check_indexed(folder, original, count, cpu, plan_for):
    """The index is older than the damage, which kept size and time: every sample is exact to the bit, or counted."""
    outcomes, shard = Counter(), folder / "0.tar"
    shard.write_bytes(original)
    index_path(shard).unlink(missing_ok=True)
    open_index(shard)
    stat = shard.stat()
    _, whole = read_all(folder, cpu, plan_for)
    for name, raw in mutants(original, count, SAME_SIZE, seed=1):
        shard.write_bytes(raw)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        try:
            dataset, batch = read_all(folder, cpu, plan_for)
        except Refused:
            outcomes["refused"] += 1
            continue
        for planned, (key, caption) in enumerate(zip(batch.keys, batch.captions)):
            read = dataset.keys.index(key)
            assert (batch.images_NHWC[planned] == whole.images_NHWC[read]).all(), name
            assert caption == whole.captions[read], name
        moved = sum(key != planned for key, planned in zip(batch.keys, dataset.keys))
        assert moved == len(batch.skipped), name
        outcomes["counted" if moved else "whole"] += 1
    return outcomes


@pytest.mark.parametrize("check", [check_foreign, check_indexed])
def test_a_sample_of_mutants(tmp_path, original, cpu, plan_for, check):
    (tmp_path / "s").mkdir()
    outcomes = check(tmp_path / "s", original, FEW, cpu, plan_for)
    assert sum(outcomes.values()) == FEW and min(outcomes["counted"], outcomes["whole"]) > 0


@pytest.mark.long
@pytest.mark.parametrize("check", [check_foreign, check_indexed])
def test_all_mutants(tmp_path, original, cpu, plan_for, check):
    (tmp_path / "s").mkdir()
    outcomes = check(tmp_path / "s", original, MANY, cpu, plan_for)
    print(f"\n{check.__name__}: {dict(outcomes)}")
    assert sum(outcomes.values()) == MANY


def webdataset_outcome(shard):
    """How many of the samples webdataset delivers from a shard, and how many faults it reports to its handler."""
    import webdataset

    told = []
    handler = lambda error: told.append(error) or True  # noqa: E731
    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False, handler=handler, empty_check=False)
    return sum(set(sample) >= {"jpg", "txt", "json"} for sample in pipeline), len(told)


@pytest.mark.long
def test_the_same_damage_elsewhere(tmp_path, original):
    """These mutants do harm: webdataset's own reader silently loses samples from them."""
    silent, trials = 0, 1500
    for _, raw in mutants(original, trials, MUTATORS, seed=0):
        (tmp_path / "0.tar").write_bytes(raw)
        delivered, told = webdataset_outcome(tmp_path / "0.tar")
        silent += delivered < SAMPLES and told == 0
    print(f"\nwebdataset: {silent} of {trials} mutants lose samples silently")
    assert silent > 0


def test_the_mutators_mutate(original):
    seen = Counter(name for name, raw in mutants(original, 300, MUTATORS, seed=3) if raw != original)
    assert set(seen) == {mutate.__name__ for mutate in MUTATORS}
    assert np.frombuffer(original, np.uint8).size % 512 == 0
