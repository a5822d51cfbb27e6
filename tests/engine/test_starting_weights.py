"""A run that begins from other weights: ours, a diffusers folder, a diffusers file; and what does not fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from duotone.data.refusal import Refused
from duotone.engine import artifact, diffusers_folder
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.model.unet import UNetConfig
from duotone.engine.recipe import Recipe
from duotone.engine.starting_weights import begin_from

ROOT = Path(__file__).parent.parent.parent
MODEL = UNetConfig(
    channels=(16, 32), attention=("none", "self"), middle="self", heads=(1, 2), blocks=(1, 1), depth=(1, 1), groups=8
)
RECIPE = Recipe(name="small", model=MODEL, conditioning=(Label(),))
FACTS = Facts(classes=("cat", "dog"))


def fresh(recipe: Recipe = RECIPE, seed: int = 1):
    torch.manual_seed(seed)
    return artifact.build(recipe, FACTS)


@pytest.fixture
def theirs(tmp_path):
    """A diffusers UNet with classes, saved by diffusers."""
    torch.manual_seed(7)
    config = diffusers_folder.to_config(MODEL, 16, classes=3)
    config.pop("_class_name")
    unet = diffusers.UNet2DModel(**config)
    unet.save_pretrained(tmp_path / "theirs")
    return unet.eval(), tmp_path / "theirs"


def test_a_diffusers_folder_predicts_here_what_it_predicts_there(theirs):
    unet, folder = theirs
    network = fresh()
    said = begin_from(network, folder, MODEL)
    x, time, labels = torch.randn(2, 3, 16, 16), torch.tensor([5.0, 300.0]), torch.tensor([0, 1])
    with torch.no_grad():
        condition = network.condition({"label": {"labels_N": labels}}, {"label": torch.ones(2, dtype=torch.bool)})
        ours = network.eval().predict(x, time, condition)
        torch.testing.assert_close(ours, unet(x, time, labels).sample, rtol=1e-5, atol=1e-5)
    assert len(said) == 1 and str(folder) in said[0]


@pytest.mark.parametrize("form", ["pipeline", "file"])
def test_other_forms_of_the_same_weights(theirs, form, tmp_path):
    unet, folder = theirs
    if form == "pipeline":
        (tmp_path / "pipeline").mkdir()
        folder.rename(tmp_path / "pipeline" / "unet")
        path = tmp_path / "pipeline"
    else:
        path = tmp_path / "single.safetensors"
        save_file({k: v.contiguous() for k, v in unet.state_dict().items()}, path)
    network = fresh()
    begin_from(network, path, MODEL)
    assert network.unet.conv_in.weight.equal(unet.conv_in.weight)


def test_our_own_file_and_a_condition_that_it_does_not_know(tmp_path):
    source = fresh(replace(RECIPE, conditioning=()), seed=5)
    named = {name: p.detach() for name, p in source.named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, replace(RECIPE, conditioning=()), Facts(), 0)
    network = fresh()
    label = network.conditioners["label"].embedding.weight.clone()
    said = begin_from(network, tmp_path, MODEL)
    assert network.unet.conv_out.weight.equal(source.unet.conv_out.weight)
    assert network.conditioners["label"].embedding.weight.equal(label)
    assert said[1:] == ["conditioners.label begins at random"]


def broken(folder: Path, tmp_path: Path, how: str) -> Path:
    if how == "other shape":
        (tmp_path / "x").mkdir()
        return folder
    if how == "a weight less":
        path = folder / diffusers_folder.WEIGHTS
        from safetensors.torch import load_file

        named = load_file(path)
        named.pop("conv_in.weight")
        save_file(named, path)
    if how == "torn":
        path = folder / diffusers_folder.WEIGHTS
        path.write_bytes(path.read_bytes()[:1000])
    if how == "original layout":
        save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
        return tmp_path / "sd.safetensors"
    if how == "unknown feature":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"downsample_type": "resnet"}))
    return tmp_path / "nowhere" if how == "absent" else folder


@pytest.mark.parametrize(
    "how,says",
    [
        ("other shape", r"another network than model: give .*--model.channels 16 32"),
        ("a weight less", "unet.conv_in.weight is only in the network"),
        ("torn", "no readable safetensors file"),
        ("original layout", "from_single_file"),
        ("unknown feature", "downsample_type = 'resnet'"),
        ("absent", "there are no weights"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_copied(theirs, how, says, tmp_path):
    path = broken(theirs[1], tmp_path, how)
    model = replace(MODEL, channels=(16, 24)) if how == "other shape" else MODEL
    network = fresh(replace(RECIPE, model=model))
    before = network.unet.conv_in.weight.clone()
    with pytest.raises(Refused, match=says):
        begin_from(network, path, model)
    assert network.unet.conv_in.weight.equal(before)


def test_other_heads_in_the_middle_are_another_network(tmp_path):
    """Heads change no shape of any weight: only their config.json tells, also of a middle below a level without attention."""
    shape = dict(channels=(16, 32), attention=("none", "none"), middle="self", blocks=(1, 1), depth=(1, 1), groups=8)
    ours, theirs = UNetConfig(heads=(1, 4), **shape), UNetConfig(heads=(1, 2), **shape)
    config = diffusers_folder.to_config(theirs, 16)
    config.pop("_class_name")
    diffusers.UNet2DModel(**config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(Refused, match=r"--model.heads 1 2"):
        begin_from(fresh(replace(RECIPE, model=ours, conditioning=())), tmp_path / "theirs", ours)


def test_a_run_begins_there_and_its_average_too(theirs, tmp_path):
    """Two steps at a tiny rate: the exported average still is what it began from."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--start", str(theirs[1]), "--out", str(tmp_path / "run"), "--images", "32", "--batch-size", "16"]
    flags += ["--optimizer.lr", "1e-12", "--optimizer.warmup", "0", "--checkpoint.every", "0", "--preview.every", "0"]
    flags += ["--preview.rows", "1", "--preview.columns", "1", "--preview.steps", "1", "--speed.threads", "1"]
    flags += ["--model.channels", "16", "32", "--model.heads", "1", "2", "--model.groups", "8"]
    command = [sys.executable, str(ROOT / "recipes" / "image_folder.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beginning from" in done.stdout and "conditioners.label begins at random" in done.stdout
    model = artifact.load(tmp_path / "run", "cpu")
    torch.testing.assert_close(model.network.unet.conv_in.weight, theirs[0].conv_in.weight, rtol=1e-6, atol=1e-7)
    assert str(tmp_path) not in (tmp_path / "run" / "ema.safetensors").read_bytes()[:100_000].decode("latin1")
