"""Conditionings by themselves: what reaches the network's ports, drop rates, null conditions, values that do not fit."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from duotone.data import captioned_shapes
from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import artifact, cli, drawing, pictures, preview
from duotone.engine.artifact import Model, build
from duotone.engine.conditioning.attributes import Attributes, attribute_row
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution, rectangles
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.temperature import Temperature
from duotone.engine.conditioning.text import ByteText, EncoderText
from duotone.engine.exchange import diffusers_config, diffusers_folder
from duotone.engine.model.unet import UNetConfig
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample
from duotone.engine.speed import Speed
from duotone.engine.train import train

NAMES = ("Bald", "Male", "Smiling")
FACTS = Facts(classes=("cat", "dog", "bird"), attributes=NAMES)
CROSS = UNetConfig(
    channels=(16, 16),
    attention=("none", "cross"),
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    context_width=16,
    groups=8,
    zero_init=False,
)
PLAIN = UNetConfig(
    channels=(16,), attention=("none",), middle="single", heads=(2,), blocks=(1,), depth=(1,), groups=8, zero_init=False
)
WITH = {"class_map": 4, "low_resolution": 3, "hole": 4}


def network_for(config, extra: int | None = None) -> UNetConfig:
    base = CROSS if config.port == "tokens" else PLAIN
    extra = WITH.get(config.kind, 0) if extra is None else extra
    return UNetConfig(**{**vars(base), "extra_channels": extra})


def model_of(*conditions, network=None, **settings) -> Model:
    torch.manual_seed(0)
    network = network or network_for(conditions[0])
    recipe = Recipe(name="t", data=Shards(size=8), conditioning=conditions, model=network, **settings)
    return Model(build(recipe, FACTS).eval().requires_grad_(False), recipe.objective, FACTS, recipe)


def batch_of(n: int, attributes=(1, 0, -1)) -> Batch:
    images_NHWC = torch.randint(0, 256, (1, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(
        positions_N=np.arange(n),
        keys=["k"] * n,
        images_NHWC=images_NHWC.repeat(n, 1, 1, 1),
        captions=["a cat"] * n,
        labels_N=torch.zeros(n, dtype=torch.int64),
        attributes_NK=torch.tensor([attributes] * n, dtype=torch.int8),
    )


def seen_at_the_input(model: Model, batch: Batch, flip_N=None, together: float = 0.0):
    """What the UNet is called with: (x, time, vector, tokens, mask)."""
    seen = []
    hook = model.network.unet.register_forward_pre_hook(lambda m, a: seen.append(a))
    n = len(batch.keys)
    flip_N = torch.zeros(n, dtype=torch.bool) if flip_N is None else flip_N
    tensors, keep = conditioned(model.network.conditioners, batch, 0, flip_N, together)
    with torch.no_grad():
        model.network(torch.zeros(n, 3, 8, 8), torch.zeros(n), tensors, keep)
    hook.remove()
    return seen[0]


# ---------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ([1, 0, None], [1, 0, -1]),
        (np.array([0, 1, -1]), [0, 1, -1]),
        (["Male", "Smiling"], [0, 1, 1]),
        ([], [0, 0, 0]),
        ({"Bald": 0}, [0, -1, -1]),
        ({"Bald": None, "Male": True}, [-1, 1, -1]),
    ],
)
def test_ways_to_ask_for_attributes(value, row):
    assert attribute_row(value, NAMES) == row


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 0], "attributes has 2 entries, but this model knows 3: Bald, Male, Smiling"),
        (["Old"], "attribute 'Old' is not one of this model's"),
        ("Male", "is a string"),
        (1, "attributes 1 is a single number: give each image a vector"),
        ([1, 0, 2], "attribute value 2"),
        ({"Old": 1}, "attribute 'Old'"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(value, says):
    with pytest.raises(Refused, match=says):
        sample(model_of(Attributes()), attributes=[value], steps=1)


@pytest.mark.parametrize("port", ["tokens", "vector"])
def test_an_attribute_reaches_its_port_by_state(port):
    model = model_of(Attributes(port=port), network=CROSS if port == "tokens" else PLAIN)
    conditioner = model.network.conditioners["attributes"]
    rows = conditioner.embedding.weight
    out = conditioner(conditioner.of_values([[1, 0, None]] * 2), torch.tensor([True, False]))
    kept, null = rows[[1, 3, 8]], rows[[2, 5, 8]]  # three rows per attribute: absent, present, unknown
    if port == "tokens":
        assert torch.equal(out.tokens_NMD, torch.stack([kept, null]))
    else:
        torch.testing.assert_close(out.vector_NE, torch.stack([kept.sum(0), null.sum(0)]))


def test_attribute_drop_rates_counted_at_the_networks_input():
    """20 % of the images lose all attributes; besides, each attribute is dropped in 30 % of images, independently."""
    n = 4000
    model = model_of(Attributes(dropout=0.2, attribute_dropout=0.3))
    tokens_NKD = seen_at_the_input(model, batch_of(n))[3]
    rows = model.network.conditioners["attributes"].embedding.weight
    unknown_NK = (tokens_NKD[:, :2] == rows[[2, 5]]).all(2)
    assert unknown_NK.float().mean().item() == pytest.approx(1 - 0.8 * 0.7, abs=0.02)
    assert unknown_NK.all(1).float().mean().item() == pytest.approx(1 - 0.8 * (1 - 0.3**2), abs=0.02)
    assert (tokens_NKD[:, 2] == rows[8]).all(), "what the data does not know stays unknown"


def test_low_resolution_drop_rate_counted_at_the_networks_input():
    model = model_of(LowResolution(dropout=0.3), network=network_for(LowResolution()))
    x_NCHW = seen_at_the_input(model, batch_of(4000))[0]
    grey_N = (x_NCHW[:, 3:] == 0).flatten(1).all(1)
    assert grey_N.float().mean().item() == pytest.approx(0.3, abs=0.025)


def test_joint_drop_rate_counted_at_the_networks_input():
    n = 4000
    model = model_of(Label(dropout=0.1), ClassMap(dropout=0.1), network=network_for(ClassMap()))
    x_NCHW, _, vector_NE, *_ = seen_at_the_input(model, batch_of(n), together=0.25)
    no_label = (vector_NE == model.network.conditioners["label"].embedding.weight[3]).all(1)
    no_map = (x_NCHW[:, 3:, 0, 0] == model.network.conditioners["class_map"].embedding.weight[3]).all(1)
    alone = 1 - 0.75 * 0.9
    assert no_label.float().mean().item() == pytest.approx(alone, abs=0.025)
    assert no_map.float().mean().item() == pytest.approx(alone, abs=0.025)
    assert (no_label & no_map).float().mean().item() == pytest.approx(0.25 + 0.75 * 0.01, abs=0.025)


# ------------------------------------------------------------------------------------------------------- labels


def test_label_as_sinusoid_is_diffusers_timestep_embedding():
    theirs = UNet2DModel(
        sample_size=8,
        block_out_channels=(16,),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        class_embed_type="timestep",
    )
    config = UNetConfig(**{**vars(PLAIN), "time_shift": 0.0})
    ours = Label(encoding="sinusoid").build(config, FACTS)
    ours.embedding.load_state_dict(theirs.class_embedding.state_dict())
    labels = torch.tensor([0, 1, 2])
    expected = theirs.class_embedding(theirs.time_proj(labels))
    got = ours({"labels_N": labels}, torch.ones(3, dtype=torch.bool)).vector_NE
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoding", ["embedding", "one_hot", "sinusoid"])
def test_label_encodings_differ_by_class_and_have_a_null(encoding):
    ours = Label(encoding=encoding).build(PLAIN, FACTS)
    labels = {"labels_N": torch.tensor([0, 1, 2, 0, 1])}
    rows = ours(labels, torch.tensor([True, True, True, False, False])).vector_NE
    # Equal rows of a matrix product may differ in the last bit, depending on their position.
    torch.testing.assert_close(rows[3], rows[4], rtol=1e-6, atol=1e-6)
    assert torch.pdist(rows[:4]).min() > 1e-3


@pytest.mark.parametrize("encoding", ["embedding", "one_hot", "sinusoid"])
def test_a_label_as_a_token_is_read_by_attention_alone(encoding):
    model = model_of(Label(port="tokens", encoding=encoding))
    found = model.network.condition(
        {"label": {"labels_N": torch.tensor([0, 1])}}, {"label": torch.tensor([True, False])}
    )
    assert found.vector_NE is None and found.tokens_NMD.shape == (2, 1, CROSS.context_width)
    drawn = sample(model, labels=["cat", "dog"], steps=2, guidance=2.0, seed=[0, 0])
    assert (drawn[0] != drawn[1]).any()
    assert "a label as a token" in diffusers_config.why_not(model.recipe)


@pytest.mark.parametrize("encoding", ["one_hot", "sinusoid"])
def test_every_label_encoding_exports_to_diffusers_as_its_table(encoding, tmp_path):
    model = model_of(
        Label(encoding=encoding),
        network=UNetConfig(
            **{
                **vars(PLAIN),
                "channels": (16, 16),
                "attention": ("none", "none"),
                "middle": "self",
                "heads": (2, 2),
                "blocks": (1, 1),
                "depth": (1, 1),
            }
        ),
    )
    diffusers_folder.export(model, tmp_path / "out")
    theirs = UNet2DModel.from_pretrained(tmp_path / "out" / "unet").eval()
    x, t, labels = torch.randn(4, 3, 8, 8), torch.tensor([1.0, 50.0, 300.0, 900.0]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        condition = model.network.conditioners["label"]({"labels_N": labels}, torch.ones(4, dtype=torch.bool))
        got = model.network.predict(x, t, condition)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_dropped_caption_leaves_nothing_beside_other_tokens():
    """Its zero keys would otherwise take a share of the attention that grows with the caption's length."""
    network = model_of(
        ByteText(width=CROSS.context_width, pooled=False), Attributes(port="tokens"), network=CROSS
    ).network
    tensors = {
        "text": network.conditioners["text"].of_values(["", "a kite", "a kite over the sea"]),
        "attributes": {"attributes_NK": torch.ones(3, len(FACTS.attributes), dtype=torch.int8)},
    }
    x_NCHW, time_N = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1), torch.full((3,), 500.0)
    apart = []
    for kept in (False, True):
        keep = {"text": torch.full((3,), kept), "attributes": torch.ones(3, dtype=torch.bool)}
        output_NCHW, _ = network(x_NCHW, time_N, tensors, keep)
        apart.append((output_NCHW - output_NCHW[:1]).abs().max().item())
    assert apart[0] < 1e-6 < 1e-3 < apart[1]


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("encoding", ["embedding", "one_hot"])
def test_class_map_is_the_class_at_every_pixel(encoding):
    """As in the diffusion course's notebook: an embedding of the label, spread over the image and concatenated."""
    extra = 4 if encoding == "embedding" else 3
    config = ClassMap(encoding=encoding, dropout=0.0)
    model = model_of(config, network=network_for(config, extra))
    x_NCHW = seen_at_the_input(model, batch_of(2))[0]
    assert x_NCHW.shape == (2, 3 + extra, 8, 8)
    row = model.network.conditioners["class_map"].embedding.weight[0] if extra == 4 else torch.tensor([1.0, 0, 0])
    assert torch.equal(x_NCHW[1, 3:], row[:, None, None].expand(-1, 8, 8))


@pytest.mark.parametrize("extra", [0, 5])
def test_extra_channels_that_do_not_match_are_refused_in_one_line(extra):
    config = ClassMap()
    with pytest.raises(Refused, match=rf"model.extra_channels = {extra}, but .* adds 4 channels \(4 of class_map\)"):
        model_of(config, network=network_for(config, extra))
    with pytest.raises(Refused, match=r"extra_channels = 2, but the conditioning adds 0 channels \(none\)"):
        model_of(Label(), network=network_for(Label(), 2))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Attributes(attribute_dropout=1.5), "attribute_dropout = 1.5"),
        (ClassMap(width=0), "ClassMap.width = 0"),
        (LowResolution(factor=0), "LowResolution.factor = 0"),
        (Temperature(low=1.0), "Temperature.low = 1.0"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_settings_out_of_range_are_refused(config, says):
    with pytest.raises(Refused, match=says):
        config.build(PLAIN, FACTS)


def test_pictures_that_a_temperature_refuses_are_refused_at_the_start():
    recipe = Recipe(name="x", conditioning=(Label(), Temperature(low=0.6)), model=PLAIN)
    with pytest.raises(Refused, match="preview.guidance = 2.0: a model with this Temperature takes 1 to 1.66667"):
        recipe.check_conditioning()
    replace(recipe, preview=replace(recipe.preview, guidance=1.5)).check_conditioning()


def test_a_temperature_needs_conditions_that_are_dropped():
    """Otherwise the unconditional prediction in its loss would never be trained itself."""
    never = Recipe(name="x", conditioning=(Label(dropout=0.0), Temperature()), model=PLAIN)
    with pytest.raises(Refused, match="label is never dropped, so that prediction is never trained"):
        never.check_conditioning()
    replace(never, drop_together=0.1).check_conditioning()


def test_the_strongest_guidance_that_a_refusal_names_is_taken():
    recipe = Recipe(name="x", conditioning=(Label(), Temperature(low=0.15)), model=PLAIN)
    replace(recipe, preview=replace(recipe.preview, guidance=6.66667)).check_conditioning()


def test_what_a_recipe_leaves_out_goes_together():
    Recipe(name="x", conditioning=(Label(),), model=PLAIN).check_budget()


@pytest.mark.parametrize("config", [Attributes(), Label(), ClassMap()], ids=lambda c: c.kind)
def test_data_without_names_is_refused(config):
    with pytest.raises(Refused, match="the data has none"):
        config.build(PLAIN, Facts())


def test_low_resolution_is_the_shrunk_image_mirrored_as_the_network_sees_it():
    model = model_of(LowResolution(factor=4, dropout=0.0))
    batch = batch_of(2)
    x_NCHW = seen_at_the_input(model, batch, torch.tensor([False, True]))[0]
    image = batch.images_NHWC[:1].permute(0, 3, 1, 2).float() / 127.5 - 1
    small = image.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    large = torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(x_NCHW[0, 3:], large[0])
    torch.testing.assert_close(x_NCHW[1, 3:], large[0].flip(2))


def test_holes_hide_what_they_cover_and_nothing_else():
    n = 500
    model = model_of(Hole(dropout=0.2))
    batch = batch_of(n)
    x_NCHW = seen_at_the_input(model, batch)[0]
    image, mask = batch.images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1, x_NCHW[:, 6:]
    torch.testing.assert_close(x_NCHW[:, 3:6], image * (1 - mask))
    whole = mask.flatten(1).mean(1) == 1
    assert whole.float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert 0.05 < mask[~whole].mean().item() < 0.5


def test_rectangles_have_sides_between_a_quarter_and_three_quarters():
    mask = rectangles(torch.rand(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 16, 32)[:, 0]
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    assert (mask.sum((1, 2)) == heights * widths).all()
    assert heights.min() >= 4 and heights.max() <= 12 and widths.min() >= 8 and widths.max() <= 24


@pytest.mark.parametrize(
    ("config", "asked", "says"),
    [
        (LowResolution(), {"images": [np.zeros((4, 4))]}, r"give uint8 \(H, W, 3\)"),
        (LowResolution(), {"labels": [0]}, "takes no labels: it takes images"),
        (
            LowResolution(),
            {"images": [np.zeros((4, 6, 3), np.uint8)]},
            "an image of 4 x 6 has another aspect ratio than",
        ),
        (LowResolution(), {"images": [np.zeros((0, 0, 3), np.uint8)]}, r"image of shape \(0, 0, 3\)"),
        (Hole(), {"images": [np.zeros((8, 8, 3), np.uint8)]}, "it takes holes .an image and its mask"),
        (Hole(), {"holes": [(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)))]}, r"but \(8, 8\) is sampled"),
    ],
    ids=["type", "kind", "shape", "no pixel", "no mask", "size"],
)
def test_images_that_do_not_fit_are_refused(config, asked, says):
    with pytest.raises(Refused, match=says):
        sample(model_of(config), **asked, steps=1)


@pytest.mark.parametrize("config", [ClassMap(), LowResolution(), Hole(), Attributes(), Label()], ids=lambda c: c.kind)
def test_every_condition_samples_without_being_given(config):
    """The placeholder value is never seen: a row that is not kept becomes the null condition, whatever it holds."""
    model = model_of(config)
    conditioner = model.network.conditioners[config.kind]
    tensors = conditioner.of_values([conditioner.placeholder], (8, 8))
    out = conditioner(tensors, torch.tensor([False]))
    other = {name: torch.ones_like(t) for name, t in tensors.items()}
    again = conditioner(other, torch.tensor([False]))
    for name, value in vars(out).items():
        assert value is None or torch.equal(value, vars(again)[name])
    assert sample(model, count=1, steps=1, sampler="euler").shape == (1, 8, 8, 3)


@pytest.mark.parametrize("config", [ClassMap(), Attributes(), Label(dropout=0.0)], ids=lambda c: c.kind)
def test_previews_ask_for_what_the_model_is_conditioned_on(config, tmp_path):
    model = model_of(config, drop_together=0.1)
    settings = preview.Previews(columns=2, rows=2, steps=1, sampler="euler", strips=True)
    rows = drawing.asked_for(settings, model, drawing.Examples())
    assert rows in ({"labels": [0, 1, 2]}, {"attributes": [{"Bald": 1}, {"Male": 1}]})
    assert model.can_be_guided, "dropped together, they have a null condition"
    drawn = [path.name for path in drawing.draw(settings, model, drawing.Examples(), tmp_path, "p")]
    assert drawn == ["p.png", "p-conditional.png", "p-unconditional.png", "p.gif"]


def test_previews_draw_the_sets_of_attributes_that_are_asked_for(tmp_path):
    settings = preview.Previews(
        columns=2, rows=2, steps=1, sampler="euler", attributes=("Bald,Male=0", "Smiling", "Male")
    )
    rows = drawing.asked_for(settings, model_of(Attributes()), drawing.Examples())
    assert rows == {"attributes": [{"Bald": 1, "Male": 0}, {"Smiling": 1}]}
    settings.check_names(FACTS)
    with pytest.raises(Refused, match="preview.attributes: attribute 'Old' is not one of this model's"):
        replace(settings, attributes=("Bald,Old",)).check_names(FACTS)


def test_every_class_has_a_sheet_of_its_own(tmp_path):
    """A sheet has rows x columns pictures; a class's name may be invalid as a file name."""
    settings = preview.Previews(columns=3, rows=2, steps=1, sampler="euler")
    model = model_of(Label())
    model = replace(model, facts=replace(model.facts, classes=("cat", "a/b: c", "bird")))
    written = drawing.draw_sheets(settings, model, tmp_path)
    assert [path.name for path in written] == ["class-000-cat.png", "class-001-a-b-c.png", "class-002-bird.png"]
    with Image.open(written[1]) as sheet:
        assert sheet.size == (8 * (3 * 10 + 2), 8 * (2 * 10 + 2)), "small images are enlarged"
    assert drawing.draw_sheets(settings, model_of(Attributes()), tmp_path) == []


def test_a_picture_is_read_as_it_was_prepared(tmp_path):
    """Turned upright, and on white where it is transparent."""
    image, exif = np.zeros((4, 8, 4), np.uint8), Image.Exif()
    image[:, :4, 3], exif[0x0112] = 255, 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    read = pictures.read(tmp_path / "a.png", 3)
    assert read.shape == (8, 4, 3) and (read[:4] == 0).all() and (read[4:] == 255).all()


def cells(path: Path, columns: int) -> np.ndarray:
    """The 8 x 8 images of a sheet, which shows them eight times enlarged, row by row."""
    sheet = np.asarray(Image.open(path))[::8, ::8].astype(int)
    rows = [np.split(row[2:, :-2], columns, axis=1) for row in np.split(sheet[:-2], len(sheet) // 10)]
    return np.array([[cell[:, 2:] for cell in row] for row in rows])


def test_strips_show_how_the_first_picture_of_each_row_came_about(monkeypatch, tmp_path):
    """However few pictures fit into memory; another strip shows what the same noise becomes without a condition."""
    config, found = preview.Previews(columns=4, steps=4, sampler="euler"), []
    for fitting in (12, 5, 3):
        monkeypatch.setattr(
            importlib.import_module("duotone.engine.sample"), "rows_that_fit", lambda *_, fitting=fitting: fitting
        )
        drawing.draw(config, model_of(Label()), drawing.Examples(), tmp_path, f"p{fitting}")
        names = [f"p{fitting}{kind}.png" for kind in ("", "-conditional", "-unconditional")]
        found.append([cells(tmp_path / name, 4) for name in names])
    sheet, strip, unasked = found[0]
    assert sheet.shape == strip.shape == unasked.shape == (3, 4, 8, 8, 3)
    assert np.abs(strip[:, -1] - sheet[:, 0]).max() <= 1 and np.abs(sheet[:, 1:] - sheet[:, :1]).max() > 50
    model, begins = model_of(Label()), [(0, 0), (0, 4), (0, 8)]
    alone = sample(model, count=3, steps=4, sampler="euler", seed=begins).astype(int)
    assert np.abs(unasked[:, -1] - alone).max() <= 1
    for others in found[1:]:
        assert all(np.abs(one - other).max() <= 1 for one, other in zip(found[0], others))
    drawing.draw(replace(config, noisy=True), model, drawing.Examples(), tmp_path, "noisy")
    far = np.abs(cells(tmp_path / "noisy-conditional.png", 4) - strip).reshape(3, 4, -1).max(axis=2)
    assert (far[:, -1] <= 1).all() and (far[:, :2] > 50).all()  # the last but one only has noise of 0.002 left


def test_no_strip_shows_a_null_state_that_was_never_trained(tmp_path):
    settings = preview.Previews(columns=2, rows=2, steps=1, sampler="euler", strips=True)
    drawn = drawing.draw(settings, model_of(Label(dropout=0.0)), drawing.Examples(), tmp_path, "p")
    assert [path.name for path in drawn] == ["p.png", "p-conditional.png", "p.gif"]


SPATIAL = [LowResolution(factor=4), Hole()]


@pytest.mark.parametrize("config", SPATIAL, ids=lambda c: c.kind)
def test_what_restores_an_image_is_what_training_saw_of_it(config):
    """values_of and of_batch give the network the same for an image, except for rounding to bytes."""
    conditioner, batch = model_of(config).network.conditioners[config.kind], batch_of(3)
    asked = conditioner.of_values(conditioner.values_of(batch.images_NHWC.numpy(), seed=5), (8, 8))
    for name, seen in conditioner.of_batch(batch, seed=5).items():
        torch.testing.assert_close(asked[name], seen, atol=1 / 127, rtol=0)


@pytest.mark.parametrize("config", SPATIAL, ids=lambda c: c.kind)
def test_previews_begin_with_the_image_that_was_given(config, tmp_path):
    model = model_of(config)
    settings = preview.Previews(columns=2, rows=2, steps=1, sampler="euler", strips=True)
    images_NHWC = batch_of(3).images_NHWC.numpy()
    drawn = drawing.draw(settings, model, drawing.Examples(images_NHWC=images_NHWC), tmp_path, "p")
    assert [path.name for path in drawn] == ["p.png", "p-conditional.png", "p-unconditional.png", "p.gif"]
    sheet = np.asarray(Image.open(drawn[0]))
    assert sheet.shape[:2] == (8 * (2 * 10 + 2), 8 * (3 * 10 + 2)), "two rows of three, eight times enlarged"
    first = sheet[16 : 16 + 64 : 8, 16 : 16 + 64 : 8].astype(int)
    conditioner = model.network.conditioners[config.kind]
    tensors = conditioner.of_values(conditioner.values_of(images_NHWC[:1]), (8, 8))
    shown = conditioner(tensors, torch.tensor([True])).channels_NKHW[0, :3].permute(1, 2, 0)
    assert np.abs((shown.numpy() + 1) * 127.5 - first).max() <= 1


def test_a_run_that_learns_to_fill_holes_draws_them_of_its_data(tmp_path):
    captioned_shapes.write(tmp_path / "shapes", count=16, size=16, seed=0)
    recipe = Recipe(
        name="holes",
        data=Shards(size=16, shards=tmp_path / "shapes"),
        conditioning=(Hole(),),
        model=network_for(Hole()),
        batch_size=4,
        images=8,
        preview=preview.Previews(every=4, columns=2, rows=3, steps=1, sampler="euler"),
        speed=Speed(threads=1),
        out=tmp_path / "run",
    )
    folder = train(recipe)
    for name in ("images-000000000004", "images-000000000008"):
        with Image.open(folder / "previews" / f"{name}.png") as sheet:
            assert sheet.size == (4 * 56, 4 * 56), "three rows of what is given and two fillings"


def test_around_a_hole_nothing_changes():
    image = batch_of(1).images_NHWC[0].numpy()
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3:7] = True
    drawn = sample(model_of(Hole()), holes=[(image, mask)] * 2, steps=2, sampler="euler")
    assert np.array_equal(drawn[0][~mask], image[~mask]) and not np.array_equal(drawn[0][mask], image[mask])
    assert not np.array_equal(*drawn)


def test_holes_are_taken_however_they_lie():
    """Grey images with and without a channel axis in one call, a flipped mask, and an image that is all hole."""
    rng = np.random.default_rng(0)
    grey_HW, mask_HW = rng.integers(0, 256, (8, 8), dtype=np.uint8), np.eye(8, dtype=bool)
    model = model_of(Hole(), network=replace(network_for(Hole(), 2), in_channels=1, out_channels=1))
    holes = [(grey_HW, mask_HW), (grey_HW[..., None], mask_HW[:, ::-1]), None]
    drawn = sample(model, holes=holes, steps=1, sampler="euler")
    assert np.array_equal(drawn[0, ~mask_HW, 0], grey_HW[~mask_HW])
    assert np.array_equal(drawn[1, ~mask_HW[:, ::-1], 0], grey_HW[~mask_HW[:, ::-1]])
    assert drawn.shape == (3, 8, 8, 1)


def test_pictures_are_sharpened_and_filled_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = batch_of(1).images_NHWC[0].numpy()
    Image.fromarray(image).save("image.png")
    Image.fromarray(image[::4, ::4]).save("small.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save("mask.png")
    for config, given in (
        (LowResolution(), ["--image", "small.png"]),
        (Hole(), ["--image", "image.png", "--mask", "mask.png"]),
    ):
        model, out = model_of(config), f"{config.kind}.png"
        artifact.save(Path("m.safetensors"), dict(model.network.named_parameters()), model.recipe, FACTS, 0)
        cli.main(["sample", "m.safetensors", *given, "--count", "3", "--steps", "2", "--columns", "3", "--out", out])
        assert "3 pictures" in capsys.readouterr().out
        sheet = np.asarray(Image.open(out))
        assert sheet.shape == (12, 32, 3)
    assert np.array_equal(sheet[2 + 4 : 2 + 8, 2:10], image[4:]), "around the hole the picture is its own"
    for wrong, says in (
        (["--mask", "mask.png"], "1 masks for 0 images"),
        (["--image", "mask.txt"], "mask.txt is not a readable picture"),
        (["--image", "image.png"], "this model takes no images: it takes holes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["sample", "m.safetensors", *wrong, "--out", "new.png"])
        assert says in capsys.readouterr().err and not Path("new.png").exists()


def test_a_picture_of_sixteen_bits_is_refused(tmp_path):
    """`duotone prepare` refuses it too; Pillow's conversion would turn nearly all of it white."""
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(Refused, match="deep.png has more than 8 bits per channel; 8 are supported"):
        pictures.read(tmp_path / "deep.png", 1)


# --------------------------------------------------------------------------------------------------------- text


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}


def small_text_encoder(family: str):
    """An encoder of random weights and the most tokens that it takes: 12, or any number."""
    import transformers as tf

    if family == "t5":
        config = tf.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        return tf.T5EncoderModel(config), None
    if family == "bert":
        return tf.BertModel(tf.BertConfig(**SMALL, max_position_embeddings=12)), 12
    if family == "roberta":  # the first row of its table of positions is the padding's
        return tf.RobertaModel(tf.RobertaConfig(**SMALL, max_position_embeddings=13, pad_token_id=0)), 12
    config = tf.DebertaV2Config(
        **SMALL,
        max_position_embeddings=12,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type="c2p|p2c",
    )
    return tf.DebertaV2Model(config), None


@pytest.mark.parametrize("family", ["t5", "bert", "roberta", "deberta"])
def test_any_text_encoder_of_transformers_gives_tokens_that_ignore_padding(family, tmp_path):
    import transformers as tf

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = tf.BertTokenizer(
        str(tmp_path / "vocab.txt"), pad_token="<pad>", unk_token="<unk>", sep_token="</s>", cls_token="</s>"
    )
    encoder, most = small_text_encoder(family)
    tokenizer.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    tokens = {}
    for length in (6, 12):
        conditioner = EncoderText(encoder=str(tmp_path), length=length).build(CROSS, FACTS)
        out = conditioner(conditioner.of_values(["a cat"]), torch.tensor([True]))
        assert out.tokens_NMD.shape == (1, length, 16) and out.mask_NM.sum() == 4
        tokens[length] = out.tokens_NMD[:, :4]
    torch.testing.assert_close(tokens[6], tokens[12], rtol=1e-5, atol=1e-5)
    assert not list(conditioner.parameters()), "a frozen encoder is no part of what is trained"
    full = conditioner(conditioner.of_values(["a cat " * 5]), torch.tensor([True]))
    assert full.mask_NM.sum() == 12 and full.tokens_NMD.isfinite().all()
    longer = EncoderText(encoder=str(tmp_path), length=13)
    if most is not None:
        with pytest.raises(Refused, match="EncoderText.length = 13: .* takes 12 tokens; give that many or fewer"):
            longer.build(CROSS, FACTS)
    else:
        conditioner = longer.build(CROSS, FACTS)
        full = conditioner(conditioner.of_values(["a cat " * 6]), torch.tensor([True]))
        assert full.mask_NM.sum() == 13 and full.tokens_NMD.isfinite().all()
