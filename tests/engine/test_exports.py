"""What the docs and the model card say about exports is what the export does."""

import json
import resource
import runpy
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from duotone.data.shards import Shards
from duotone.engine import artifact, cli, model_card, small
from duotone.engine.artifact import Model
from duotone.engine.conditioning.base import Facts
from duotone.engine.exchange import diffusers_config, diffusers_folder, diffusers_unet
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.sample import sample
from duotone.engine.sampling.samplers.euler import euler

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
FACTS = Facts(classes=("cat", "dog"), attributes=("Bald", "Male"))


def recipe_of(name: str):
    return runpy.run_path(str(RECIPES[name]), run_name="recipe")["recipe"]


def test_the_gallery_says_of_every_recipe_what_it_exports_as():
    said = [line for line in (ROOT / "docs" / "gallery.md").read_text().splitlines() if line.startswith("| `")]
    reasons = {name: diffusers_config.why_not(recipe_of(name)) for name in sorted(RECIPES)}
    assert said == [f"| `{name}.py` | {f'no: {why}' if why else 'yes'} |" for name, why in reasons.items()]


@pytest.mark.parametrize("name", ["small_text", "small_label", "small_attributes", "small_concat", "small_plain"])
def test_what_is_said_is_what_the_export_does(name, tmp_path):
    """On the small networks, quick to build: written as a folder, or refused with the reason that the card gives."""
    recipe = replace(getattr(small, name), data=Shards(size=16))
    torch.manual_seed(0)
    model = Model(artifact.build(recipe, FACTS), recipe.objective, FACTS, recipe)
    why = diffusers_config.why_not(recipe)
    assert (why is None) == (name in ("small_text", "small_label", "small_plain"))
    card = model_card.card(recipe, FACTS, 0)
    if why is None:
        diffusers_folder.export(model, tmp_path / "folder")
        assert (tmp_path / "folder" / "unet" / "config.json").exists()
        assert "| as a diffusers folder | `duotone export` |" in card
        told = (tmp_path / "folder" / "README.md").read_text()
        (line,) = (line for line in told.splitlines() if line.startswith("from diffusers import "))
        namespace: dict = {}
        exec(line, namespace)  # the classes that it names exist, and load the folder
        for part, name in zip(("unet", "scheduler"), line.removeprefix("from diffusers import ").split(", ")):
            namespace[name].from_pretrained(tmp_path / "folder", subfolder=part)
        assert "ema.safetensors" not in told and "library_name: diffusers" in told
    else:
        with pytest.raises(diffusers_unet.Inexpressible, match=why):
            diffusers_folder.export(model, tmp_path / "folder")
        assert f"| as a diffusers folder | no, only as a single file: {why} |" in card
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line(tmp_path, capsys):
    """safetensors' own message for it differs from version to version."""
    recipe = replace(small.small_label, data=Shards(size=16))
    artifact.save(tmp_path / "m.safetensors", dict(artifact.build(recipe, FACTS).named_parameters()), recipe, FACTS, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "out.safetensors")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "File too large" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


OBJECTIVES = {
    "epsilon": DDPM(),
    "x0, cosine": DDPM(schedule="cosine", prediction="x0"),
    "v, zero SNR": DDPM(schedule="scaled_linear", prediction="v", rescale_zero_snr=True),
    "edm": EDM(sigma_data=0.6),
    "flow": Flow(shift=2.0),
}


def plain_model(objective) -> Model:
    """A model without a condition, whose output is far from zero, so that a wrong scale or time shows."""
    recipe = replace(small.small_plain, data=Shards(size=16), objective=objective)
    recipe = replace(recipe, model=replace(recipe.model, zero_init=False))
    torch.manual_seed(0)
    network = artifact.build(recipe, Facts()).eval().requires_grad_(False)
    return Model(network, recipe.objective, Facts(), recipe)


def their_steps(folder: Path, start: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples the exported folder with diffusers alone, deterministically, from the same noise."""
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler, settings = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler"), {}
    if name == "DDPMScheduler":
        scheduler, settings = diffusers.DDIMScheduler.from_config(scheduler.config), {"use_clipped_model_output": True}
    times = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=times) if name.startswith("Flow") else scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma if name.startswith("EDM") else start
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(unet(scaled, t).sample, t, x, **settings).prev_sample
    return x


@pytest.mark.parametrize("name", OBJECTIVES)
def test_diffusers_draws_from_the_folder_what_is_drawn_here(name, tmp_path):
    """UNet and scheduler together give the same picture from the same noise: their steps against our Euler steps."""
    model, seen = plain_model(OBJECTIVES[name]), []
    notes = diffusers_folder.export(model, tmp_path / "folder")
    assert (notes == []) == isinstance(model.objective, DDPM)

    def watched(denoise, x_NCHW, sigmas, **settings):
        scale = (1 + sigmas[0] ** 2).sqrt() if isinstance(model.objective, DDPM) else sigmas[0]
        seen.append(x_NCHW if sigmas[0].isinf() else x_NCHW / scale)
        return seen.append(euler(denoise, x_NCHW, sigmas)) or seen[-1]

    sample(model, count=2, steps=8, sampler=watched, seed=2)
    start, ours = seen
    theirs = their_steps(tmp_path / "folder", start, 8)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() <= 5e-4 * ours.abs().max().clamp(min=1)


def test_an_exported_ddpm_is_a_pipeline_of_theirs(tmp_path):
    diffusers_folder.export(plain_model(DDPM()), tmp_path / "folder")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline(batch_size=1, num_inference_steps=3, output_type="np").images.shape == (1, 16, 16, 3)
    diffusers_folder.export(plain_model(EDM()), tmp_path / "edm")
    assert not (tmp_path / "edm" / "model_index.json").exists()
