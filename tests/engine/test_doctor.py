"""The doctor names each published system's bug when it is planted, and finds a sound recipe sound."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.write_shards import Sample, write_shards
from duotone.engine import cli, draws, small
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import ClassMap
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText, ByteTokens
from duotone.engine.doctor.encoders import Once, reading_once
from duotone.engine.doctor.examination import examine
from duotone.engine.doctor.patient import Finding
from duotone.engine.doctor.settings import unread
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_file import recipe_at
from duotone.engine.speed import Speed

ROOT = Path(__file__).parent.parent.parent
SOUND = Recipe(
    name="sound",
    data=Shards(size=16),
    conditioning=(Label(dropout=0.1),),
    objective=DDPM(steps=1000),
    model=UNetConfig(
        channels=(16, 16),
        attention=("none", "none"),
        middle="single",
        heads=(1, 1),
        blocks=(1, 1),
        depth=(1, 1),
        groups=8,
    ),
    optimizer=AdamW(warmup=1000),
    ema=Ema(half_life=1000),
    batch_size=64,
    images=64_000,
)


def found(recipe: Recipe) -> dict[str, Finding]:
    """The worst finding of each subject."""
    worst, order = {}, ("fault", "warning", "unknown", "fine")
    for finding in examine(recipe):
        held = worst.get(finding.subject)
        if held is None or order.index(finding.level) < order.index(held.level):
            worst[finding.subject] = finding
    return worst


def test_a_sound_recipe_is_found_sound():
    levels = {subject: finding.level for subject, finding in found(SOUND).items()}
    assert not [subject for subject, level in levels.items() if level == "fault"]
    assert levels["label.dropout"] == levels["timesteps"] == levels["network"] == levels["guidance"] == "fine"
    assert levels["settings"] == "fine" and "preview.guidance" not in levels


def test_arithmetic_that_is_not_to_be_had_is_a_fault(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    half = replace(SOUND, speed=Speed(device="cpu", precision="fp16"))
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    assert found(half)["speed.precision"].level == "fault"
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    assert "speed.precision" not in found(half)


def planted_normal_dropout(monkeypatch) -> Recipe:
    """randn instead of rand: a normal number is below 0.1 in 54 % of cases."""
    uniform = draws.uniform

    def wrong(seed, positions_N, purpose, count=1):
        u = uniform(seed, positions_N, purpose, count)
        return torch.special.ndtri(u) if purpose == draws.Purpose.DROP else u

    monkeypatch.setattr(draws, "uniform", wrong)
    return SOUND


@dataclass(frozen=True, kw_only=True)
class WithoutTheLast(DDPM):
    def draw_sigma(self, u_N):
        return self.sigmas[(u_N * (self.steps - 1)).long()]


def planted_untrained_timestep(monkeypatch) -> Recipe:
    return replace(SOUND, objective=WithoutTheLast(steps=1000))


def planted_sinusoid(monkeypatch) -> Recipe:
    return replace(SOUND, conditioning=(Label(encoding="sinusoid", dropout=0.1),))


def planted_batch_normalisation(monkeypatch) -> Recipe:
    build = UNetConfig.build

    def wrong(config):
        unet = build(config)
        unet.conv_norm_out = nn.BatchNorm2d(16)
        return unet

    monkeypatch.setattr(UNetConfig, "build", wrong)
    return SOUND


def planted_guidance_without_a_null(monkeypatch) -> Recipe:
    return replace(SOUND, conditioning=(Label(dropout=0.0),), preview=Previews(guidance=3.0))


def planted_guidance_never_applied(monkeypatch) -> Recipe:
    return replace(SOUND, preview=Previews(guidance=1.0))


def planted_blind_condition(monkeypatch) -> Recipe:
    """Every class becomes the same class: the network is never told which."""
    from duotone.engine.conditioning.label import LabelConditioner

    of_batch = LabelConditioner.of_batch
    monkeypatch.setattr(
        LabelConditioner, "of_batch", lambda self, batch, seed=0: {"labels_N": 0 * of_batch(self, batch)["labels_N"]}
    )
    return SOUND


def planted_long_warm_up(monkeypatch) -> Recipe:
    return replace(SOUND, optimizer=AdamW(warmup=100_000))


def planted_late_average(monkeypatch) -> Recipe:
    return replace(SOUND, ema=Ema(half_life=500_000, rampup=0.0))


def planted_uneven_batch(monkeypatch) -> Recipe:
    return replace(SOUND, batch_size=50, images=50_000)


def planted_silent_setting(monkeypatch) -> Recipe:
    return replace(SOUND, objective=DDPM(gamma=3.0))


def planted_few_levels(monkeypatch) -> Recipe:
    """T is mistaken for the number of sampling steps."""
    return replace(SOUND, objective=DDPM(steps=50))


def planted_weightless_level(monkeypatch) -> Recipe:
    return replace(SOUND, objective=DDPM(prediction="v", weighting="min_snr", rescale_zero_snr=True))


@pytest.mark.parametrize(
    "plant,subject,level,says",
    [
        (planted_normal_dropout, "label.dropout", "fault", "configured 10.0%, measured at the network's input 5"),
        (planted_untrained_timestep, "timesteps", "fault", "1 of 1000 timesteps are never trained (t = 999), the last"),
        (planted_sinusoid, "label.encoding", "warning", "class 3 lay between 2 and 4"),
        (planted_batch_normalisation, "network", "fault", "conv_norm_out normalises over the batch"),
        (planted_guidance_without_a_null, "preview.guidance", "fault", "label is never dropped"),
        (planted_guidance_never_applied, "preview.guidance", "warning", "unguided, although guidance is trained for"),
        (planted_blind_condition, "label", "fault", "says nothing"),
        (planted_long_warm_up, "optimizer.warmup", "fault", "the run ends at 64,000"),
        (planted_late_average, "ema", "fault", "the random ones of the start"),
        (planted_uneven_batch, "batch_size", "warning", "does not divide among 4, 8 ranks"),
        (planted_few_levels, "objective.steps", "warning", "50 levels of linear end where 78% of the image is left"),
        (planted_weightless_level, "objective.weighting", "warning", "t = 999 weight 0"),
        (planted_silent_setting, "objective.gamma", "warning", "has no effect: objective.weighting is simple"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_is_named(plant, subject, level, says, monkeypatch):
    began = time.process_time()
    finding = found(plant(monkeypatch))[subject]
    assert finding.level == level and says in finding.says, finding
    assert time.process_time() - began < 10  # processor seconds: the doctor promises not to take minutes


def test_guidance_that_nothing_is_trained_for_is_not_missed():
    """With guidance 1, a recipe whose condition is never dropped is consistent, and so is one without any condition."""
    for conditions in ((Label(dropout=0.0),), ()):
        said = found(replace(SOUND, conditioning=conditions, preview=Previews(guidance=1.0)))
        assert "preview.guidance" not in said


def coco(encoder: Path) -> Recipe:
    recipe = recipe_at(ROOT / "recipes" / "coco_clip.py", [], "x")
    return replace(recipe, conditioning=(replace(recipe.conditioning[0], encoder=str(encoder)),))


def test_how_often_captions_are_dropped_is_measured_without_their_encoder(monkeypatch, tmp_path):
    sound = found(coco(tmp_path / "nowhere"))
    assert sound["text.dropout"].level == "fine" and sound["text"].level == "unknown"
    assert sound["text.encoder"].level == "unknown" and "nowhere' cannot be loaded" in sound["text.encoder"].says
    planted_normal_dropout(monkeypatch)
    named = found(coco(tmp_path / "nowhere"))["text.dropout"]
    assert named.level == "fault" and "configured 10.0%, measured at the network's input 5" in named.says


def test_an_encoder_of_another_width_has_no_stand_in():
    """The encoder is present but refused: the only line is the reason for that."""
    wide = replace(SOUND, conditioning=(ByteText(width=96, heads=4),))
    assert found(wide)["text.dropout"].says.startswith("not measured: model.context_width = 512")


def test_a_caption_is_read_once_and_stands_in_its_rows():
    captions, tokens, seen = ["a", "b", "a", "c", "b"], ByteTokens(8), []
    read = reading_once(lambda captions: seen.append(captions) or tokens(captions))
    assert all(torch.equal(tensor, tokens(captions)[name]) for name, tensor in read(captions).items())
    assert seen == [["a", "b", "c"]]


def test_a_caption_is_encoded_once_in_however_many_rows_it_stands():
    torch.manual_seed(0)
    text = ByteText(width=16, layers=1, heads=2, length=8).build(UNetConfig(context_width=16), Facts()).eval()
    captions, encode, seen = ["a", "b", "a", "c", "b"], text.encode, []
    once = Once(lambda tensors: seen.append(tensors["ids_NM"]) or encode(tensors))
    with torch.no_grad():
        tensors = text.of_values(captions)
        torch.testing.assert_close(once(tensors), encode(tensors), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(once(text.of_values(["c", "d"])), encode(text.of_values(["c", "d"])))
    assert torch.equal(torch.cat(seen), text.of_values(["a", "b", "c", "d"])["ids_NM"])


ATTENDING = replace(SOUND.model, attention=("none", "self"))


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (replace(SOUND, preview=Previews(prompts=("a cat",))), ["preview.prompts"]),
        (replace(SOUND, preview=Previews(attributes=("Male",))), ["preview.attributes"]),
        (replace(SOUND, preview=Previews(sheets=True), conditioning=()), ["preview.sheets"]),
        (replace(SOUND, preview=Previews(noisy=True, strips=False)), ["preview.noisy"]),
        (replace(SOUND, log=Log(wandb_pictures=True)), ["log.wandb_pictures"]),
        (replace(SOUND, preview=Previews(prompts=("a cat",)), conditioning=(ByteText(),)), []),
        (replace(SOUND, data=Shards(size=16, resize="squash", crop="random")), ["data.crop"]),
        (replace(SOUND, data=Shards(size=16, resize="none", crop="random")), ["data.crop"]),
        (replace(SOUND, data=Shards(size=16, resize="crop", crop="random")), []),
        (replace(SOUND, conditioning=(Label(), ClassMap(encoding="one_hot", width=7))), ["conditioning.1.width"]),
        (replace(SOUND, conditioning=(ClassMap(encoding="embedding", width=7),)), []),
        (replace(SOUND, model=replace(SOUND.model, heads=(2, 2))), ["model.heads"]),
        (replace(SOUND, model=replace(SOUND.model, heads=(1, 4))), ["model.heads"]),
        (replace(SOUND, model=replace(SOUND.model, heads=(4, 4))), []),
        (replace(SOUND, model=replace(SOUND.model, depth=(2, 1))), ["model.depth"]),
        (replace(SOUND, model=replace(SOUND.model, context_width=99)), ["model.context_width"]),
        (replace(SOUND, model=replace(ATTENDING, heads=(2, 2), depth=(2, 2), context_width=99)), []),
        (replace(SOUND, model=replace(SOUND.model, middle="self", heads=(2, 2))), []),
    ],
)
def test_a_setting_that_nothing_reads_is_named(recipe, names):
    assert [name for name, _ in unread(recipe)] == names


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_of_this_repository_sets_nothing_without_effect(path):
    assert list(unread(recipe_at(path, [], "x"))) == []


@pytest.mark.parametrize("name", ["small_text", "small_label", "small_attributes", "small_concat", "small_plain"])
def test_nor_does_a_small_one(name):
    assert list(unread(getattr(small, name))) == []


@pytest.fixture(scope="module")
def grey_shards(tmp_path_factory):
    """Pixels of 64 and 192, whose standard deviation is almost exactly one half."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("grey")
    for name, label in (("even", 0), ("odd", 1)):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.where((np.arange(256).reshape(16, 16) // 16 + i + label) % 2, 64, 192).astype(np.uint8)
            Image.fromarray(np.repeat(pixels[..., None], 3, 2)).save(folder / "pictures" / name / f"{i}.png")
    from duotone.data.prepare.image_folder import PrepareFolder

    PrepareFolder(images=folder / "pictures", out=folder / "shards").run()
    return folder / "shards"


def test_sigma_data_is_held_against_the_data(grey_shards):
    data = Shards(size=16, shards=grey_shards)
    wrong, right = (replace(SOUND, data=data, objective=EDM(sigma_data=s)) for s in (0.25, 0.502))
    assert found(wrong)["objective.sigma_data"].level == "warning"
    assert "measured 0.502" in found(wrong)["objective.sigma_data"].says
    assert found(right)["objective.sigma_data"].level == "fine"
    assert found(right)["data"].says.startswith("16 samples")


@pytest.fixture
def duotone(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code, output and error lines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        code = 0
        try:
            cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err.strip().splitlines()

    return call


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_the_command_finds_no_fault_in_a_recipe(recipe, duotone):
    code, said, _ = duotone("doctor", f"recipes/{recipe}.py")
    assert code == 0 and "0 faults" in said, said


def test_one_attribute_that_is_dropped_in_two_ways_is_no_fault(tmp_path):
    """A single attribute dropped by itself looks like all of them dropped together; both have their own setting."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    samples = [Sample(image=pixels + i, attributes=[i % 2]) for i in range(8)]
    write_shards(samples, tmp_path / "s", attributes=["Smiling"], image_format="npy")
    data = Shards(shards=tmp_path / "s", size=16)
    recipe = replace(SOUND, data=data, conditioning=(Attributes(port="vector", attribute_dropout=0.3),))
    assert found(recipe)["attributes.dropout"].level == "fine"


def test_a_text_recipe_over_data_without_captions_is_refused(tmp_path):
    write_shards([Sample(image=np.zeros((16, 16, 3), np.uint8))] * 8, tmp_path / "s", image_format="npy")
    recipe = replace(SOUND, data=Shards(shards=tmp_path / "s", size=16), conditioning=(ByteText(),))
    with pytest.raises(Refused, match="caption"):
        found(recipe)


def test_the_command_tells_a_fault_by_its_exit_code(duotone):
    flags = ("--optimizer.warmup", "10000000", "--preview.guidance", "2")
    code, said, _ = duotone("doctor", "recipes/mnist_concat.py", *flags)
    assert code == 1 and "2 faults" in said, said


def test_the_estimate_counts_parameters_memory_and_arithmetic(duotone):
    code, said, _ = duotone("estimate", "recipes/mnist_concat.py")
    assert code == 0 and "parameters      1.7 M" in said and "GFLOP an image forward" in said
    assert "80 GB" in said and "1 ranks x  128" in said


@pytest.mark.parametrize(
    "arguments,says",
    [
        (("doctor",), "needs a recipe's file or a run's folder"),
        (("doctor", "recipes/none.py"), "recipes/none.py does not exist"),
        (("estimate", "engine/draws.py"), "defines no `recipe = Recipe(...)`"),
        (("estimate", "recipes/mnist_concat.py", "--batch-sise", "3"), "the nearest key is --batch-size"),
        (("doctor", "recipes/mnist_concat.py", "--images", "1000"), "not a multiple of batch_size"),
        (("examine", "recipes/mnist_concat.py"), "give one of prepare, sample, export, evaluate, doctor, estimate"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments, says, duotone):
    code, _, lines = duotone(*arguments)
    assert code == 2 and len(lines) == 1 and says in lines[0], lines


def test_a_file_that_fails_is_refused_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("recipe = 1 / 0\n")
    with pytest.raises(Refused, match="ZeroDivisionError"):
        recipe_at(tmp_path / "broken.py", [], "x")
