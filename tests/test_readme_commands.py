"""Every command of the README, run in the README's order in an empty folder, with budgets of seconds."""

import gzip
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
RUN = "--images 32 --batch-size 16 --checkpoint.every 16 --preview.every 0 --preview.rows 1 --preview.columns 1 --preview.steps 1 --speed.threads 1"
# Flags added to a command so that it takes seconds; a later pattern adds to an earlier one.
SHORTER = {
    r"^(deepspeed|python) recipes/": RUN,
    r"recipes/image_folder": "--model.channels 32 32 --model.attention none self --model.heads 2 2 --model.blocks 1 1 --model.depth 1 1 --data.size 16",
    r"coco_clip.py --data": "--model.channels 32 32 --model.attention none cross --model.heads 2 2 --model.blocks 1 1 --model.depth 1 1 --data.size 16 --conditioning.0.encoder clip",
    r"prepare idx": "--limit 40",
    r"duotone (sample|evaluate)": "--steps 2",
}
ELSEWHERE = {
    r"^make ": "the demo and the tests themselves",
}


def commands() -> list[str]:
    """The README's commands in order, without trailing comments."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = ("duotone ", "deepspeed ", "python ", "make ")
    return [line for line in lines if line.startswith(starts) and not any(re.search(p, line) for p in ELSEWHERE)]


def shortened(command: str) -> list[str]:
    extra = [] if "--help" in command else [flag for p, flag in SHORTER.items() if re.search(p, command)]
    words = shlex.split(command.replace("~", "home")) + shlex.split(" ".join(extra))
    return [words[0], "--master_port", str(free_port()), *words[1:]] if words[0] == "deepspeed" else words


def free_port() -> int:
    """A free port of this machine, where other runs may hold the launcher's usual one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with what the README takes for granted: the repository's scripts and the reader's own files."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "bench"):
        (folder / name).symlink_to(ROOT / name)
    photographs(folder / "home" / "pictures", folder / "train2017")
    captions(folder)
    clothes(folder)
    untrained_clip(folder / "clip")
    return folder


def photographs(*folders: Path) -> None:
    """Fills folders with real photographs, which come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    for folder in folders:
        for i in range(16):
            inside = folder / ("china", "flower")[i % 2] if folder.name == "pictures" else folder
            inside.mkdir(parents=True, exist_ok=True)
            pixels = load_sample_images().images[i % 2][10 * i : 10 * i + 200, :300]
            Image.fromarray(np.ascontiguousarray(pixels)).save(inside / f"{i:012d}.jpg")


def captions(folder: Path) -> None:
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 200, "width": 300} for i in range(16)],
        "annotations": [{"id": i, "image_id": i, "caption": f"a photograph, number {i}"} for i in range(16)],
    }
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))


def clothes(folder: Path) -> None:
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(FASHION / f"train-{kind}-ubyte.gz", folder)
        with gzip.open(folder / f"train-{kind}-ubyte.gz") as file:
            assert file.read(3) == b"\0\0\x08"


def untrained_clip(folder: Path) -> None:
    """A CLIP text model of the reference width, since the real one has to be downloaded."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)] + list("0123456789,.")
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **sizes, **ends)).save_pretrained(folder)


def test_every_command_of_the_readme_runs(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = commands()
    assert len(found) >= 10 and {line.split()[0] for line in found} == {"duotone", "deepspeed", "python"}
    for command in found:
        words = shortened(command)
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    made = (
        "runs/captioned_shapes/ema.safetensors",
        "runs/image_folder/ema.safetensors",
        "circle.png",
        "shapes-model/unet",
    )
    assert all((folder / name).exists() for name in made)


def test_every_bench_of_the_readme_is_run_by_a_test():
    benches = set(re.findall(r"python bench/(\w+)\.py", (ROOT / "README.md").read_text()))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    assert benches and not [name for name in benches if f"bench/{name}.py" not in tests and f'"{name}' not in tests]
