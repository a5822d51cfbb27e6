"""Shards from strangers: nothing in them is executed, extracted or allowed to fill the memory."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

WATCHED = """
import json, resource, sys
from pathlib import Path
import numpy as np, torch
from duotone.data.batch import Plan
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
if "dali" in sys.argv[2:]:
    import nvidia.dali
import PIL.Image; PIL.Image.init()
seen = []
def watch(event, args):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"):
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append(f"open {args[0]} {args[1]}")
folder = Path(sys.argv[1])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.addaudithook(watch)
outcome = {}
for on_bad in ("refuse", "replace"):
    try:
        dataset = Shards(shards=folder, size=32, on_bad=on_bad, decoder=sys.argv[2]).open(torch.device("cpu"))
        count = dataset.count
        plan = Plan(positions_N=np.arange(count), samples_N=np.arange(count), crops_N2=np.zeros((count, 2)), captions_N=np.zeros(count))
        batch = dataset.read(plan)
        outcome[on_bad] = {"keys": batch.keys, "skipped": batch.skipped}
    except Refused as refused:
        outcome[on_bad] = str(refused)
outcome["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024
outcome["seen"] = [event for event in seen if ".index.json" not in event]
print(json.dumps(outcome))
"""


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_nothing_runs_and_nothing_swells(tmp_path, write_tar, members_of, decoder):
    """In a separate process that records every unpickled name, program, connection and file opened for writing."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    payload = b"cposix\nsystem\n(S'true'\ntR."
    members = [member for member in members_of(2) if not member[0].endswith("json")]
    members += [("payload.jpg", members_of(1)[0][1])]
    members += [(f"payload.{extension}", payload) for extension in ("pyd", "pkl", "pickle", "pth", "cbor", "npz")]
    members += [("bomb.png", png_bomb(15_000, 15_000)), ("object.npy", object_npy()), ("deep.jpg", members_of(1)[0][1])]
    members += [("deep.json", b'{"a":' * 50_000)]
    write_tar(tmp_path / "s" / "0.tar", members)
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, tmp_path / "s", decoder], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert "bomb" in outcome["refuse"] and "pixels exceed" in outcome["refuse"]
    assert outcome["replace"]["keys"] == ["00000", "00001", "payload", "00000", "00000", "00000"]
    assert len(outcome["replace"]["skipped"]) == 3
    assert outcome["seen"] == [] and outcome["megabytes"] < 300


def png_bomb(width, height):
    """A valid PNG of a few hundred kilobytes that asks for 675 MB."""
    rows = zlib.compress(bytes((1 + 3 * width) * height), 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw)) for name, raw in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def object_npy():
    stream = io.BytesIO()
    np.save(stream, np.array([[[{}]]], dtype=object), allow_pickle=True)
    return stream.getvalue()
