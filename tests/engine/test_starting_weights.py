"""A run that begins from existing weights: ours, a diffusers folder or a diffusers file; and what does not fit."""

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
from duotone.engine import artifact
from duotone.engine.command_line import parse
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.exchange import diffusers_config, diffusers_folder, diffusers_unet, original_layout
from duotone.engine.exchange.starting_weights import begin_from, weights_file
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.recipe import Recipe

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
    config = diffusers_unet.to_config(MODEL, 16, classes=3)
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


SINUSOIDAL = replace(RECIPE, conditioning=(Label(encoding="sinusoid"),))


def predicted(network, x_NCHW, time_N, labels_N) -> torch.Tensor:
    keep = {"label": torch.ones(len(labels_N), dtype=torch.bool)}
    with torch.no_grad():
        return network.eval().predict(x_NCHW, time_N, network.condition({"label": {"labels_N": labels_N}}, keep))


@pytest.fixture(params=[{}, {"flip_sin_to_cos": False, "freq_shift": 1}], ids=["cosines first", "sines first, shifted"])
def numbered(request, tmp_path):
    """A diffusers UNet that embeds the class number in the same way as the time, and a recipe of its shape."""
    torch.manual_seed(8)
    config = diffusers_unet.to_config(MODEL, 16) | {"class_embed_type": "timestep"} | request.param
    theirs = diffusers_unet.from_config(config)
    config.pop("_class_name")
    unet = diffusers.UNet2DModel(**config)
    unet.save_pretrained(tmp_path / "numbered")
    return unet.eval(), tmp_path / "numbered", replace(SINUSOIDAL, model=theirs)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_class_by_its_number_is_the_label_as_a_sinusoid(numbered, form, tmp_path):
    """Begun from it, our network predicts what theirs does, for every class and time; and so does our export of it."""
    unet, path, recipe = numbered
    if form == "file":
        path = tmp_path / "single.safetensors"
        save_file({k: v.contiguous() for k, v in unet.state_dict().items()}, path)
    network = fresh(recipe)
    said = begin_from(network, path, recipe.model, None, recipe.conditioning, FACTS)
    time_N, labels_N = torch.tensor([0.0, 5.0, 300.0, 999.0]).repeat(2), torch.tensor([0, 1]).repeat_interleave(4)
    x_NCHW = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        expected = unet(x_NCHW, time_N, labels_N).sample
        assert (expected - unet(x_NCHW, time_N, 1 - labels_N).sample).abs().max() > 1e-3
    torch.testing.assert_close(predicted(network, x_NCHW, time_N, labels_N), expected, rtol=1e-5, atol=1e-5)
    assert len(said) == 2 and "the null class is number 2, one past the last, which was not trained as one" in said[1]

    diffusers_folder.export(artifact.Model(network, recipe.objective, FACTS, recipe), tmp_path / "out")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x_NCHW, time_N, labels_N).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_sinusoid_is_no_beginning_of_another_label(numbered):
    """A one-hot vector of sixteen classes is as wide as the first level's sinusoid: the weights fit, but mean nothing."""
    _, path, recipe = numbered
    facts = Facts(classes=tuple("abcdefghijklmnop"))
    for encoding in ("one_hot", "embedding"):
        recipe = replace(recipe, conditioning=(Label(encoding=encoding),))
        torch.manual_seed(1)
        network = artifact.build(recipe, facts)
        before = {name: p.clone() for name, p in network.conditioners.named_parameters()}
        said = begin_from(network, path, recipe.model, None, recipe.conditioning, facts)
        assert all(torch.equal(before[name], p) for name, p in network.conditioners.named_parameters())
        assert said[1:3] == ["conditioners.label begins at random", "conditioners.label is left behind"]
        assert said[3:] == [f"its condition label means something else: encoding sinusoid there, {encoding} here"]


def test_our_own_sinusoid_had_its_null_class(tmp_path):
    source = fresh(SINUSOIDAL, seed=5)
    named = {name: p.detach() for name, p in source.named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, SINUSOIDAL, FACTS, 0)
    network = fresh(SINUSOIDAL)
    assert len(begin_from(network, tmp_path, MODEL, None, SINUSOIDAL.conditioning, FACTS)) == 1
    assert all(torch.equal(p, named[name]) for name, p in network.named_parameters())


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


@pytest.mark.parametrize("names", [("dog", "cat"), ("cat", "dog")])
def test_a_row_of_another_name_is_no_beginning(tmp_path, names):
    """As many classes with other names: their rows fit, but mean something else."""
    source = fresh(seed=5)
    named = {name: p.detach() for name, p in source.named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, RECIPE, FACTS, 0)
    network = fresh()
    own = network.conditioners["label"].embedding.weight.clone()
    said = begin_from(network, tmp_path, MODEL, None, RECIPE.conditioning, Facts(classes=names))
    found = network.conditioners["label"].embedding.weight
    if names == FACTS.classes:
        assert found.equal(source.conditioners["label"].embedding.weight) and len(said) == 1
    else:
        assert found.equal(own) and said[-1].startswith("its condition label means something else: names cat dog there")


def test_rows_of_another_port_are_no_beginning(tmp_path):
    """Equally wide rows, but added to the time embedding there, and read by attention here."""
    model = replace(MODEL, attention=("none", "cross"), middle="cross", context_width=64)
    facts = Facts(attributes=("Smiling", "Male"))
    text = ByteText(width=64, layers=1, heads=2, length=8)
    source, ours = (replace(RECIPE, model=model, conditioning=(text, Attributes(port=p))) for p in ("vector", "tokens"))
    there, here = artifact.build(source, facts), artifact.build(ours, facts)
    named = {name: p.detach() for name, p in there.named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, source, facts, 0)
    own = here.conditioners["attributes"].embedding.weight.clone()
    said = begin_from(here, tmp_path, model, None, ours.conditioning, facts)
    assert here.conditioners["attributes"].embedding.weight.equal(own)
    assert said[-1] == "its condition attributes means something else: port vector there, tokens here"


def test_our_own_file_says_what_shapes_do_not(tmp_path):
    """Heads and the order of a sinusoid change no shape; another prediction changes what the weights mean."""
    theirs = replace(RECIPE, model=replace(MODEL, heads=(1, 4), time_flip=False), objective=DDPM(prediction="v"))
    source = fresh(theirs)
    named = {name: p.detach() for name, p in source.named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, theirs, FACTS, 0)
    with pytest.raises(
        Refused, match="another network than model: give --model.heads 1 4 --model.no-time-flip$"
    ) as told:
        begin_from(fresh(), tmp_path, MODEL)
    remedy = str(told.value).partition("give ")[2].split()
    assert parse(Recipe, remedy, default=replace(theirs, model=MODEL)) == theirs
    said = begin_from(fresh(theirs), tmp_path, theirs.model, DDPM(schedule="cosine"))
    assert said[1:] == [
        "it was trained on another objective: schedule linear there, cosine here, prediction v there, epsilon here"
    ]
    assert begin_from(fresh(theirs), tmp_path, theirs.model, DDPM(prediction="v", gamma=2.0))[1:] == []


def test_an_exported_folder_of_a_text_model_begins_a_run_again(tmp_path):
    """UNet and projection of the pooled caption begin from it; the byte encoder, not part of it, begins at random."""
    conditions = (ByteText(width=12, layers=1, heads=2, length=8),)
    recipe = replace(RECIPE, model=TEXT, conditioning=conditions)
    source, network = fresh(recipe, seed=5), fresh(recipe)
    model = artifact.Model(source, recipe.objective, FACTS, recipe)
    diffusers_folder.export(model, tmp_path / "folder")
    said = begin_from(network, tmp_path / "folder", TEXT)
    named = dict(source.named_parameters())
    same = [name for name, p in network.named_parameters() if torch.equal(p, named[name])]
    assert {name for name in named if name.startswith(("unet.", "conditioners.text.pool."))} <= set(same)
    assert said[1:] == ["conditioners.text begins at random"]


TEXT = UNetConfig(
    channels=(16, 32, 32),
    attention=("cross", "none", "cross"),
    heads=(2, 2, 4),
    blocks=(2, 2, 2),
    depth=(1, 1, 1),
    context_width=12,
    groups=8,
    in_channels=4,
    out_channels=4,
    zero_init=False,
)


def in_original_layout(unet) -> dict[str, torch.Tensor]:
    """A UNet's weights as a file in the original layout holds them, beside a codec and a text encoder."""
    ours = {b: a for a, b in [*original_layout.ENDS.items(), *original_layout.blocks(unet.config)]}
    named = {original_layout.renamed(name, ours): p.detach() for name, p in unet.named_parameters()}
    assert not any(name.split(".")[0] in ("down_blocks", "up_blocks", "mid_block") for name in named)
    others = {"first_stage_model.decoder.conv_in.bias": torch.ones(1), "cond_stage_model.x": torch.ones(1)}
    return {f"model.diffusion_model.{name}": p for name, p in named.items()} | others


@pytest.mark.parametrize("config", [TEXT, replace(TEXT, attention=("none", "cross", "none"), linear_projection=True)])
def test_an_original_single_file_fills_the_unet_as_diffusers_reads_it(config, tmp_path):
    """diffusers' converter is the oracle: it turns the file back into the original state dict, name by name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    torch.manual_seed(3)
    source = config.build()
    file = in_original_layout(source)
    theirs = convert_ldm_unet_checkpoint(dict(file), {"layers_per_block": 2})
    assert theirs.keys() == source.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in source.state_dict().items())
    save_file(file, tmp_path / "single.safetensors")
    conditions = (ByteText(width=12, layers=1, heads=2, length=8, pooled=False),)
    network = fresh(replace(RECIPE, model=config, conditioning=conditions))
    said = begin_from(network, tmp_path / "single.safetensors", config)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.unet.state_dict().items())
    assert any("model.heads is believed" in line for line in said)
    assert "conditioners.text begins at random" in said


def test_stable_diffusions_single_file_is_known_name_by_name():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        ours = diffusers_unet.from_config({**model.config, "_class_name": "UNet2DConditionModel"}).build()
    file = in_original_layout(ours)
    assert len(file) == 686 + 2 and "model.diffusion_model.output_blocks.8.2.conv.weight" in file
    assert convert_ldm_unet_checkpoint(dict(file), model.config).keys() == ours.state_dict().keys()
    back = original_layout.by_diffusers_names(file, ours.config)
    assert back.keys() == ours.state_dict().keys()


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
        save_file({"model.diffusion_model.input_blocks.9.0.op.weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
        return tmp_path / "sd.safetensors"
    if how == "unknown feature":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"downsample_type": "resnet"}))
    return tmp_path / "nowhere" if how == "absent" else folder


def test_weights_by_another_name_are_told(tmp_path):
    """Names under which diffusers saves weights with a variant, in several files or pickled."""
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        Refused, match="no weights under a known name, but diffusion_pytorch_model.bin and 1 more; .*without a variant"
    ):
        weights_file(tmp_path)


@pytest.mark.parametrize(
    "how,says",
    [
        ("other shape", r"another network than model: give .*--model.channels 16 32"),
        ("a weight less", "unet.conv_in.weight is only in the network"),
        ("torn", "not a readable safetensors file"),
        ("original layout", "unet.conv_in.bias is only in the network"),
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
    """Heads change no weight's shape: only config.json tells them, also for a middle below a level without attention."""
    shape = dict(channels=(16, 32), attention=("none", "none"), middle="self", blocks=(1, 1), depth=(1, 1), groups=8)
    ours, theirs = UNetConfig(heads=(1, 4), **shape), UNetConfig(heads=(1, 2), **shape)
    config = diffusers_unet.to_config(theirs, 16)
    config.pop("_class_name")
    diffusers.UNet2DModel(**config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(Refused, match=r"--model.heads 1 2"):
        begin_from(fresh(replace(RECIPE, model=ours, conditioning=())), tmp_path / "theirs", ours)


def test_heads_of_a_level_without_attention_mean_nothing(tmp_path):
    theirs = replace(RECIPE, model=replace(MODEL, heads=(4, 2)))
    named = {name: p.detach() for name, p in fresh(theirs, seed=2).named_parameters()}
    artifact.save(tmp_path / "ema.safetensors", named, theirs, FACTS, 0)
    network = fresh()
    begin_from(network, tmp_path, MODEL)
    assert network.unet.conv_in.weight.equal(named["unet.conv_in.weight"])


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (DDPM(prediction="v"), None),
        (DDPM(), "prediction_type v_prediction there, epsilon here"),
        (EDM(), "prediction_type v_prediction there, none here, beta_schedule linear there, none here"),
    ],
    ids=["the same", "another prediction", "another family"],
)
def test_weights_that_were_taught_another_objective_are_named(theirs, objective, says, tmp_path):
    (tmp_path / "pipeline").mkdir()
    theirs[1].rename(tmp_path / "pipeline" / "unet")
    scheduler = diffusers.DDIMScheduler(1000, prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    said = begin_from(fresh(), tmp_path / "pipeline", MODEL, objective)
    told = [line for line in said if "another objective" in line]
    assert len(told) == (says is not None) and all(says in line for line in told)


@pytest.mark.parametrize("told", [False, True], ids=["a network alone", "a pipeline"])
def test_an_objective_that_diffusers_does_not_have_begins_from_any_weights(told, theirs, tmp_path, monkeypatch):
    def none(objective):
        raise diffusers_unet.Inexpressible("an objective of one's own")

    monkeypatch.setattr(diffusers_config, "scheduler_config", none)
    (tmp_path / "pipeline").mkdir()
    theirs[1].rename(tmp_path / "pipeline" / "unet")
    if told:
        diffusers.DDIMScheduler(1000).save_pretrained(tmp_path / "pipeline" / "scheduler")
    said = begin_from(fresh(), tmp_path / "pipeline", MODEL, EDM())
    assert any("another objective" in line for line in said) == told


@pytest.mark.parametrize("broken", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_whose_json_is_broken_is_refused_in_one_line(broken, theirs, tmp_path):
    (tmp_path / "pipeline" / "scheduler").mkdir(parents=True)
    theirs[1].rename(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / broken).write_text("{")
    with pytest.raises(Refused, match="is not readable as JSON"):
        begin_from(fresh(), tmp_path / "pipeline", MODEL, EDM())


def test_a_run_begins_there_and_its_average_too(theirs, tmp_path):
    """After two steps at a tiny learning rate, the exported EMA still equals the starting weights."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--start", str(theirs[1]), "--out", str(tmp_path / "run"), "--images", "32", "--batch-size", "16"]
    flags += ["--optimizer.lr", "1e-12", "--optimizer.warmup", "0", "--checkpoint.every", "0", "--preview.every", "0"]
    flags += ["--preview.rows", "1", "--preview.columns", "1", "--preview.steps", "1", "--speed.threads", "1"]
    flags += ["--model.channels", "16", "32", "--model.heads", "1", "2", "--model.groups", "8", "--model.no-film"]
    command = [sys.executable, str(ROOT / "recipes" / "image_folder.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beginning from" in done.stdout and "conditioners.label begins at random" in done.stdout
    model = artifact.load(tmp_path / "run", "cpu")
    torch.testing.assert_close(model.network.unet.conv_in.weight, theirs[0].conv_in.weight, rtol=1e-6, atol=1e-7)
    assert str(tmp_path) not in (tmp_path / "run" / "ema.safetensors").read_bytes()[:100_000].decode("latin1")
