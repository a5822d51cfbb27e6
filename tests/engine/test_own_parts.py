"""Custom parts, written outside of the package: what accepts them, and what says where they must be registered."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import artifact, cli, drawing, load, model_card, pictures, preview, register, train
from duotone.engine.artifact import Model, build
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.doctor import conditions, noise
from duotone.engine.doctor.patient import Patient
from duotone.engine.evaluate import evaluation
from duotone.engine.evaluate.images import Images
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.own_file import import_file
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import refuse_unstorable
from duotone.engine.sample import NotFinite, sample
from duotone.engine.speed import Speed

PLAIN = UNetConfig(
    channels=(8, 8), attention=("none", "none"), middle="absent", heads=(1, 1), blocks=(1, 1), depth=(1, 1), groups=4
)
FACTS = Facts(classes=("a", "b"))


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """How bright a picture is, 0 to 1."""

    kind, port = "brightness", "vector"
    dropout: float = 0.2
    shown: tuple[float, ...] = (0.2, 0.8)

    def build(self, network: UNetConfig, facts: Facts) -> "BrightnessConditioner":
        return BrightnessConditioner(self, network)


class BrightnessConditioner(Conditioner):
    kind, keyword = "brightness", "brightness"
    placeholder = 0.0

    def __init__(self, config: Brightness, network: UNetConfig):
        super().__init__()
        self.dropout, self.shown = config.dropout, config.shown
        self.linear = nn.Linear(1, network.embedding_width)

    def of_batch(self, batch, seed=0):
        return {"mean_N": batch.images_NHWC.float().mean((1, 2, 3)) / 255}

    def of_values(self, values, size=None):
        return {"mean_N": torch.tensor(values, dtype=torch.float32)}

    def examples(self):
        return list(self.shown)

    def forward(self, tensors, keep_N):
        return Conditioning(vector_NE=self.linear(tensors["mean_N"][:, None]) * keep_N[:, None])


def model_of(*conditioning, **settings) -> Model:
    settings = {"name": "own", "model": PLAIN, "data": Shards(size=8), "objective": EDM(sigma_data=0.5)} | settings
    recipe = Recipe(conditioning=conditioning, **settings)
    torch.manual_seed(0)
    network = build(recipe, FACTS).requires_grad_(False)
    for p in network.parameters():  # with weights that begin at zero, conditions would have no effect
        p.add_(0.1 * torch.randn_like(p))
    return Model(network, recipe.objective, FACTS, recipe)


def test_a_condition_of_ones_own_is_asked_for_by_its_name():
    model = model_of(Brightness())
    images = sample(model, brightness=[0.1, 0.9], steps=2, guidance=2.0, seed=[3, 3])
    assert images.shape == (2, 8, 8, 3) and (images[0] != images[1]).any() and model.forwards == 6
    with pytest.raises(Refused, match="takes no brightnes: it takes brightness"):
        sample(model, brightnes=[0.1], steps=2)
    with pytest.raises(Refused, match="brightness = 0.3: give a list"):
        sample(model, brightness=0.3, steps=2)


def test_previews_show_its_examples_and_what_cannot_be_drawn_is_refused_before_the_first_step():
    config = preview.Previews(rows=4, guidance=2.0)
    shown, silent = model_of(Brightness(), Label()), model_of(Brightness(shown=()))
    rows = drawing.asked_for(config, shown, drawing.Examples())
    assert rows == {"brightness": [0.2, 0.8], "labels": [0, 1]}
    drawing.refuse_undrawable(config, shown, drawing.Examples())
    rows = drawing.asked_for(config, silent, drawing.Examples())
    assert rows == {"count": 4} and drawing.settings_of(config, silent, rows)["guidance"] == 1.0
    drawing.refuse_undrawable(config, silent, drawing.Examples())
    with pytest.raises(
        Refused, match="preview: .*never trained without its brightness.*`examples` would be: brightness"
    ):
        drawing.refuse_undrawable(config, model_of(Brightness(shown=(), dropout=0.0)), drawing.Examples())


def test_an_evaluation_that_cannot_ask_for_it_says_so():
    images = Images(images_NHWC=torch.zeros(2, 8, 8, 3, dtype=torch.uint8).numpy(), fingerprint="")
    with pytest.raises(Refused, match="takes brightness, but the data has none"):
        evaluation.conditions(model_of(Brightness()), images)


@dataclass(frozen=True, kw_only=True)
class Own(EDM):
    """An objective that is registered nowhere."""


@register
@dataclass(frozen=True, kw_only=True)
class Halved(EDM):
    def weight(self, sigma_N):
        return super().weight(sigma_N) / 2


OwnEDM = dataclass(frozen=True, kw_only=True)(type("EDM", (EDM,), {}))


def test_a_part_that_a_stored_recipe_could_not_name_is_refused_before_it_is_trained(tmp_path):
    sound = Recipe(name="x", conditioning=(Label(),), model=PLAIN, out=tmp_path / "run")
    refuse_unstorable(sound)
    with pytest.raises(
        Refused,
        match=r"recipe.objective is .*test_own_parts.Own, .*put @duotone.engine.register above it, or add it to the kinds",
    ):
        train(replace(sound, objective=Own()))
    with pytest.raises(Refused, match="and duotone.engine.objectives.edm has a EDM already: give it another name"):
        refuse_unstorable(replace(sound, objective=OwnEDM()))
    with pytest.raises(Refused, match=r"recipe.conditioning.1 is .*test_own_parts.Brightness"):
        refuse_unstorable(replace(sound, conditioning=(Label(), Brightness())))
    assert not (tmp_path / "run").exists()


def test_a_part_that_is_registered_is_trained_and_loaded(tmp_path):
    """In any process that has imported it; a name that is taken is refused."""

    captioned_shapes.write(tmp_path / "shards", count=16, size=16)
    data = Shards(shards=tmp_path / "shards", size=16, threads=1, decoder="pillow")
    pictures = preview.Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False)
    settings = {"model": PLAIN, "batch_size": 8, "images": 8, "checkpoint": Checkpoints(every=0), "preview": pictures}
    recipe = Recipe(name="own", data=data, objective=Halved(sigma_data=0.5), out=tmp_path / "run", **settings)
    folder = train(replace(recipe, speed=Speed(device="cpu", threads=1)))
    assert type(load(folder).objective) is Halved
    with pytest.raises(Refused, match="duotone.engine.objectives.edm has a EDM already; rename it"):
        register(OwnEDM)
    try:  # as when a notebook cell is run again
        again = register(dataclass(frozen=True, kw_only=True)(type("Halved", (EDM,), {"__module__": __name__})))
        refuse_unstorable(replace(recipe, objective=again()))
    finally:
        register(Halved)


MINE = '''
from __future__ import annotations

from dataclasses import dataclass

from beside import SHARE

from duotone.data.shards import Shards
from duotone.engine import Recipe, main, register
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.preview import Previews
from duotone.engine.speed import Speed


@register
@dataclass(frozen=True, kw_only=True)
class Mine(EDM):
    """Weighs less."""

    share: float = SHARE

    def weight(self, sigma_N):
        return self.share * super().weight(sigma_N)


one = {"heads": (1,), "blocks": (1,), "depth": (1,), "channels": (8,), "attention": ("none",)}
recipe = Recipe(
    name="mine",
    data=Shards(size=16, threads=1, decoder="pillow"),
    model=UNetConfig(**one, middle="absent", groups=4),
    objective=Mine(sigma_data=0.5),
    batch_size=8,
    images=8,
    preview=Previews(every=0, rows=1, columns=1, steps=1, strips=False),
    checkpoint=Checkpoints(every=0),
    speed=Speed(device="cpu", threads=1),
)

if __name__ == "__main__":
    main(recipe)
'''


def test_a_file_of_ones_own_is_trained_by_and_given_to_a_command(tmp_path, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text(MINE)
    (tmp_path / "beside.py").write_text("SHARE = 0.5\n")
    captioned_shapes.write(tmp_path / "shards", count=16, size=16)
    ran = subprocess.run([sys.executable, str(mine), "--data.shards", str(tmp_path / "shards"), "--out", str(out)])
    assert ran.returncode == 0
    words = ["sample", str(out), "--steps", "1", "--out", str(tmp_path / "s.png")]
    with pytest.raises(SystemExit):
        cli.main(words)
    said = capsys.readouterr().err
    assert "names the type 'Mine'" in said and "or give it to the command: duotone --with FILE COMMAND" in said
    ran = subprocess.run([sys.executable, "-m", "duotone.engine.cli", "--with", str(mine), *words])
    assert ran.returncode == 0 and (tmp_path / "s.png").exists()
    command = [sys.executable, "-m", "duotone.engine.cli", "estimate", str(mine)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and "micro-batch" in ran.stdout, ran.stderr


@pytest.fixture
def path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_file_that_was_just_edited_is_read_anew(path_restored, tmp_path):
    """Bytecode is stored with its file's time, in seconds, and length: here both stay the same."""
    mine = tmp_path / "mine.py"
    for number in (1, 2):
        mine.write_text(f"number = {number}")
        os.utime(mine, (10**9, 10**9))
        assert import_file(mine).number == number


def test_the_command_asks_for_a_condition_of_ones_own(path_restored, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(artifact, "load", lambda *_, **__: model_of(Brightness()))
    sheet = tmp_path / "s.png"
    words = ["sample", "run", "--steps", "1", "--columns", "4", "--out", str(sheet), "--overwrite", "--own"]
    cli.main([*words, "brightness=[0.1, 0.9]", "--count", "2"])
    drawn = pictures.read(sheet, 3)
    expected = sample(model_of(Brightness()), brightness=[0.1, 0.1, 0.9, 0.9], steps=1, guidance=2.0)
    assert drawn.tolist() == np.asarray(pictures.grid(expected, 4)).tolist() and "4 pictures" in capsys.readouterr().out
    for given, says in (
        ("brightness=0.1", "write a name, = and a JSON list"),
        ("brightness=[]", "write a name, = and a JSON list"),
        ("brightness=[0.1", "write a name, = and a JSON list"),
        ("0=[1]", "write a name, = and a JSON list"),
        ("steps=[1]", "--own steps: this is no condition of your own"),
        ('brightness=["x"]', "BrightnessConditioner cannot read ['x'] (ValueError: "),
        ("brightness=[null]", "BrightnessConditioner cannot read [None] (TypeError: "),
        ("brightnes=[0.1]", "takes no brightnes: it takes brightness"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, given])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and says in said and said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main([*words, "brightness=[0.1]", "brightness=[0.9]"])
    assert "--own brightness is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (None, "--with : there is no such file; give a Python file and then the command"),
        ("mine.py", "mine.py cannot be imported \\(ZeroDivisionError: division by zero\\)"),
        ("mine.txt", "mine.txt cannot be imported \\(SyntaxError: invalid syntax"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(file, says, tmp_path, capsys, path_restored):
    given = []
    if file is not None:
        (tmp_path / file).write_text("1 / 0" if file == "mine.py" else "no Python")
        given = [str(tmp_path / file), "sample", "run"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["--with", *given])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(says, line), line


def test_a_sampler_that_gives_no_picture_is_told():
    """At infinite noise, x is the noise itself: a sampler that divides by sigma there is left with nothing."""

    def naive(denoise, x_NCHW, sigmas, **_):
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            x_NCHW = x_NCHW + (following - sigma) * (x_NCHW - denoise(x_NCHW, sigma.item())) / sigma
        return x_NCHW

    with pytest.warns(NotFinite, match="2 of 2 pictures have values that are not finite"):
        sample(model_of(objective=Flow()), count=2, steps=2, sampler=naive)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFinite)
        sample(model_of(objective=Flow()), count=2, steps=2)


def test_a_rule_that_has_no_such_name_is_refused(tmp_path, capsys):
    recipe = Recipe(name="x", conditioning=(Label(),), model=PLAIN, data=Shards(size=8), objective=EDM(sigma_data=0.5))
    path = tmp_path / "m.safetensors"
    artifact.save(path, dict(build(recipe, FACTS).named_parameters()), recipe, FACTS, 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", str(path), "--label", "a", "--rule", "zero-star", "--out", str(tmp_path / "s.png")])
    assert (
        stop.value.code == 2 and "rule 'zero-star' is unknown: there are plain, apg, cfg++" in capsys.readouterr().err
    )


def test_a_card_shows_how_each_kind_is_asked_for():
    for said, *kinds in (
        ("images=[small_HWC]", LowResolution()),
        ("holes=[(image_HWC, mask_HW)]", Hole()),
        ("brightness=[...]", Brightness()),
        ("labels=['a']", Label()),
        ("labels=['a']", Label(), ClassMap()),
    ):
        recipe = Recipe(name="x", conditioning=tuple(kinds))
        told = "\n".join(model_card.usage(recipe, FACTS, "m.safetensors"))
        assert f'load("m.safetensors"), {said}, steps=' in told
    assert ", count=1, steps=" in "\n".join(model_card.usage(Recipe(name="x"), FACTS, "m.safetensors"))


# ------------------------------------------------------------------------------------------------- what the doctor sees


@dataclass(frozen=True, kw_only=True)
class Tokens(Brightness):
    """Declares the port vector, but gives tokens."""

    def build(self, network, facts):
        made = super().build(network, facts)
        made.forward = lambda tensors, keep_N: Conditioning(
            tokens_NMD=(tensors["mean_N"] * keep_N)[:, None, None].expand(-1, 2, network.context_width)
        )
        return made


@dataclass(frozen=True, kw_only=True)
class Restless(Brightness):
    """Draws from PyTorch's own generator."""

    def build(self, network, facts):
        made = super().build(network, facts)
        made.of_batch = lambda batch, seed=0: {"mean_N": torch.rand(len(batch.keys))}
        return made


@dataclass(frozen=True, kw_only=True)
class OneLevel(EDM):
    def draw_sigma(self, u_N):
        return torch.full_like(u_N, 80.0)


def found(check, **settings) -> dict:
    recipe = Recipe(name="x", model=PLAIN, data=Shards(size=16), **settings)
    return {finding.subject: finding for finding in check(Patient(recipe))}


def test_the_doctor_sees_what_such_parts_do():
    said = found(conditions.says_something, conditioning=(Tokens(),))["brightness"]
    assert said.level == "fault" and "no level reads them" in said.says
    assert found(conditions.says_something, conditioning=(Brightness(),))["brightness"].level == "fine"
    said = found(conditions.draws_by_position, conditioning=(Restless(), Label()))
    assert list(said) == ["brightness.of_batch"] and said["brightness.of_batch"].level == "fault"
    said = found(noise.trained_levels, objective=OneLevel())["noise levels"]
    assert said.level == "warning" and "at or below which training draws 0" in said.says
    assert found(noise.trained_levels, objective=EDM())["noise levels"].level == "fine"
