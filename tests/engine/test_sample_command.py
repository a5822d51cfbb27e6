"""`duotone sample` as a user types it: what it prints, sheets of guidance scales, and one line for each mistake."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duotone.data.shards import Shards
from duotone.engine import artifact, cli
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.pictures import ByStep
from duotone.engine.recipe import Recipe

FACTS = Facts(classes=("cat", "dog"), attributes=("Bald", "Male"))
SHAPE = dict(channels=(16, 16), heads=(2, 2), blocks=(1, 1), depth=(1, 1), context_width=16, groups=8, zero_init=False)
CROSS = UNetConfig(attention=("none", "cross"), middle="cross", **SHAPE)
PLAIN = UNetConfig(attention=("none", "none"), middle="self", **SHAPE)
TEXT = ByteText(width=16, layers=1, heads=2, length=24, pooled=False)
MODELS = {
    "text": ((TEXT,), CROSS, EDM()),
    "label": ((Label(),), PLAIN, DDPM()),
    "undropped": ((Label(dropout=0.0),), PLAIN, EDM()),
    "attributes": ((Attributes(),), CROSS, EDM()),
    "alone": ((), PLAIN, EDM()),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (conditioning, network, objective) in MODELS.items():
        torch.manual_seed(0)
        recipe = Recipe(name=name, data=Shards(size=8), conditioning=conditioning, model=network, objective=objective)
        named = {key: p.detach() for key, p in artifact.build(recipe, FACTS).named_parameters()}
        artifact.save(folder / name, named, recipe, FACTS, 0)
    return folder


def draw(model: Path, *flags: str) -> None:
    cli.main(["sample", str(model), "--steps", "2", "--sampler", "euler", *flags])


MISTAKES = [
    ("text", "--prompt a --guidance nan", "guidance = nan: give finite numbers"),
    ("text", "--prompt a --interval 5 1", "interval = (5.0, 1.0): give two noise levels sigma that rise"),
    ("text", "--prompt a --rescale 2", "rescale = 2.0: it must lie in [0, 1]"),
    ("text", "--prompt a --rule cfg++ --guidance 3", "CFG++ takes guidance between 0 and 1"),
    ("text", "--prompt a --rule cfg++ --sampler heun", "set sampler to euler"),
    ("text", "--prompt a --spacing leading", "spacing 'leading' is unknown to EDM: there are karras, log-linear"),
    ("text", "--prompt a --sampler euler9", "sampler 'euler9' is unknown: there are euler, heun"),
    ("text", "--prompt a --steps 0", "steps = 0: it must be a whole number, at least 1"),
    ("text", "--prompt a --size -3", "size: a side = -3: it must be a whole number, at least 1"),
    ("text", "--prompt a --count 0", "count = 0: it must be at least 1"),
    ("text", "--prompt a --columns -2", "columns = -2: it must be at least 1"),
    ("text", "--prompt a --out sheet.xyz", "sheet.xyz: .xyz is not a kind of picture; end it in .png"),
    ("text", "--prompt a --out /proc/new/sheet.png", "/proc/new cannot be made"),
    ("text", "--prompt a --gif film.jpg", "film.jpg: .jpg is not a kind of film; end it in .gif"),
    ("nothing there", "--attribute Male=1:1.2.3", "attribute 'Male=1:1.2.3': write NAME, NAME=0, or NAME=1:3"),
    ("text", "--prompt caf\udce9", r"prompt 'caf\udce9' is not valid UTF-8: write it in UTF-8"),
    ("text", "--prompt a --negative caf\udce9", r"prompt 'caf\udce9' is not valid UTF-8"),
    ("text", "--label cat", "this model takes no labels: it takes prompts"),
    ("label", "--label wolf", "label 'wolf' is no class of this model: give a number below 2 or one of cat, dog"),
    ("label", "--label cat --guidance 1 --rescale 0.5", "have no effect at guidance 1"),
    ("label", "--label cat --gif same.gif --out same.gif", "--gif and --out are both same.gif"),
    ("label", "--label cat --strip same.png --out same.png", "--strip and --out are both same.png"),
    ("label", "--label cat --noisy", "--noisy has no effect without --gif or --strip"),
    ("attributes", "--attribute Male Male=0", "attribute 'Male' is given twice"),
    ("attributes", "--attribute Male,Male=0", "attribute 'Male' is given twice"),
    (
        "attributes",
        "--attribute Male,Bald Bald=1:3",
        "attribute 'Bald=1:3': write NAME, or NAME=0, several with commas",
    ),
    ("attributes", "--attribute Male,", "attribute '': write NAME"),
    ("attributes", "--attribute Male,Old", "attribute 'Old' is not one of this model's"),
    ("label", "--label \u00b2", "label '\u00b2' is no class of this model"),
    ("label", "--label cat --negative blurry", "negative prompts given, but this model takes no prompts"),
    ("label", "--label cat --steps 2000", "steps = 2000: noise levels must fall at every step"),
    ("undropped", "--label cat --guidance 2", "trained with condition dropout 0 for its labels: leave guidance at 1"),
    ("attributes", "--attribute Old", "attribute 'Old' is not one of this model's: it knows Bald, Male"),
    ("attributes", "--attribute Male=1:3 --guidance 2", "--guidance is given with scales by attribute (Male)"),
    ("alone", "--guidance 3", "guidance needs a condition"),
    ("alone", "--prompt a", "this model takes no prompts: it takes no condition, only count"),
]


@pytest.mark.parametrize(("model", "flags", "says"), MISTAKES, ids=[f"{m} {f}" for m, f, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(model, flags, says, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        draw(models / model, *flags.split())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("duotone: refused: ") and says in told[0]
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_caption_that_is_cut_is_told_in_one_line_and_drawn(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        draw(models / "text", "--prompt", "a red circle on a blue background", "--count", "2")
    assert capsys.readouterr().err.splitlines() == [
        "duotone: warning: caption 'a red circle on a blue background'... is longer than the text encoder takes; "
        "cut: ' background'"
    ]
    assert Path("sample.png").exists()


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("label", "--label cat --guidance 1", "2.0 forward passes each, 1.00 an evaluation"),
        ("label", "--label cat", "4.0 forward passes each, 2.00 an evaluation"),
        ("undropped", "--label cat", "2.0 forward passes each, 1.00 an evaluation"),
        ("label", "--label cat --interval 0 50", "3.0 forward passes each, 1.50 an evaluation"),
        ("label", "--label cat --guidance 0", "2.0 forward passes each, 1.00 an evaluation"),
        ("alone", "", "2.0 forward passes each, 1.00 an evaluation"),
    ],
)
def test_the_cost_is_printed(model, flags, says, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(models / model, *flags.split())
    assert capsys.readouterr().out == f"1 pictures in sample.png, {says}\n"


def test_layers_shared_by_both_branches_cost_less_than_two_forwards(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(models / "text", "--prompt", "a")
    assert 1.0 < float(capsys.readouterr().out.split(",")[2].split()[0]) < 2.0


def test_several_scales_are_a_sheet_with_a_row_each(models, tmp_path, monkeypatch, capsys):
    """All rows begin with the same noise; each row is what its scale draws alone."""
    monkeypatch.chdir(tmp_path)
    draw(models / "label", "--label", "cat", "dog", "--guidance", "1", "4", "--out", "both.png")
    assert capsys.readouterr().out.startswith("4 pictures in both.png")
    draw(models / "label", "--label", "cat", "dog", "--guidance", "4", "--out", "four.png")
    both, four = (np.asarray(Image.open(name)).astype(int) for name in ("both.png", "four.png"))
    assert both.shape == (22, 22, 3) and four.shape == (12, 22, 3)
    assert np.abs(both[10:] - four).max() <= 1
    assert np.abs(both[:12] - four).max() > 1


def test_several_sets_of_attributes_are_a_row_each(models, tmp_path, monkeypatch, capsys):
    """Each row is what its set draws alone, from the noise of its position."""
    monkeypatch.chdir(tmp_path)
    draw(models / "attributes", "--attribute", "Male,Bald=0", "Bald", "--count", "2", "--out", "both.png")
    assert capsys.readouterr().out.startswith("4 pictures in both.png")
    draw(models / "attributes", "--attribute", "Male", "Bald=0", "--count", "2", "--out", "one.png")
    both, one = (np.asarray(Image.open(name)).astype(int) for name in ("both.png", "one.png"))
    assert both.shape == (22, 22, 3) and one.shape == (12, 22, 3)
    assert np.abs(both[:12] - one).max() <= 1


def test_a_strip_ends_with_the_picture(models, tmp_path, monkeypatch):
    """Each picture has a row of eight moments; the denoised image of the last step is the picture."""
    monkeypatch.chdir(tmp_path)
    draw(models / "label", "--label", "cat", "dog", "--strip", "strip.png", "--steps", "9", "--columns", "1")
    strip, sheet = (np.asarray(Image.open(name)).astype(int) for name in ("strip.png", "sample.png"))
    assert strip.shape == (22, 82, 3) and sheet.shape == (22, 12, 3)
    assert np.abs(strip[:, 70:] - sheet).max() <= 1 and np.abs(strip[:, :12] - sheet).max() > 1


def test_a_noisy_strip_ends_with_the_picture_too(models, tmp_path, monkeypatch):
    """The denoised image and the noisy one are the same at the last step, and differ before."""
    monkeypatch.chdir(tmp_path)
    for name, flags in (("idea.png", []), ("noisy.png", ["--noisy"])):
        asked = ["--label", "cat", "dog", "--steps", "8", "--columns", "1", "--overwrite"]
        draw(models / "label", *asked, "--strip", name, *flags)
    idea, noisy, sheet = (np.asarray(Image.open(n)).astype(int) for n in ("idea.png", "noisy.png", "sample.png"))
    assert np.abs(noisy[:, 70:] - sheet).max() <= 1 and np.abs(noisy[:, :70] - idea[:, :70]).max() > 50


def test_steps_are_shown_at_the_scale_that_keeps_variance():
    """x0 = 0.2 with noise of 0.4 at sigma 2 is scaled to 1 / sqrt(5); the last is the picture itself."""
    seen = ByStep(torch.tensor([math.inf, 2.0, 0.0]))
    for step, x in enumerate((1.0, 0.2)):
        seen(step, torch.full((1, 1, 1, 1), x), torch.zeros(1, 1, 1, 1))
    assert [image.item() for image in seen.images] == [185, 153]  # 127.5 * (1 + 0.4472), 127.5 * 1.2


@pytest.mark.parametrize("flags", ["--rule apg", "--rule cfg++ --guidance 0.6", "--rescale 0.7", "--spacing leading"])
def test_other_ways_to_guide_draw_another_picture(flags, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(models / "label", "--label", "cat", "--out", "plain.png")
    draw(models / "label", "--label", "cat", "--out", "other.png", *flags.split())
    assert Path("plain.png").read_bytes() != Path("other.png").read_bytes()
