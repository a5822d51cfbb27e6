"""The reference text network with a CLIP from disk, on real photographs in COCO's format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from duotone.data.prepare.coco import PrepareCoco
from duotone.engine.command_line import parse
from duotone.engine.recipe import Recipe
from duotone.engine.train import train

COCO = Path(__file__).parents[2] / "recipes" / "coco_clip.py"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An untrained CLIP text model of the reference width and its tokenizer, in a folder that from_pretrained reads."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "text"
    letters = [chr(c) for c in range(97, 123)] + list("0123456789,.")
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """scikit-learn's two photographs with captions in COCO's format, prepared by the class behind the real command."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("coco")
    (root / "train2017").mkdir()
    images, annotations = [], []
    for i, (pixels, words) in enumerate(
        zip(load_sample_images().images, (("a temple", "an old palace"), ("a flower",)))
    ):
        Image.fromarray(pixels).save(root / "train2017" / f"{i:012d}.jpg")
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": pixels.shape[0], "width": pixels.shape[1]})
        annotations += [{"id": 10 * i + j, "image_id": i, "caption": w} for j, w in enumerate(words)]
    captions = root / "captions_train2017.json"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    PrepareCoco(images=root / "train2017", annotations=captions, out=root / "shards", size=160).run()
    return root / "shards"


def recipe_of(flags: list[str]) -> Recipe:
    import runpy

    return parse(Recipe, flags, default=runpy.run_path(str(COCO), run_name="recipe")["recipe"])


def flags(shards: Path, clip: Path, out: Path, side: int, batch: int, steps: int) -> list[str]:
    return [
        *("--data.shards", str(shards), "--conditioning.0.encoder", str(clip), "--out", str(out)),
        *("--data.size", str(side), "--batch-size", str(batch), "--accumulation", "1", "--images", str(batch * steps)),
        *("--checkpoint.every", "0", "--preview.every", "0", "--preview.columns", "1", "--preview.rows", "1"),
        *(
            "--preview.steps",
            "1",
            "--preview.sampler",
            "euler",
            "--preview.no-strips",
            "--log.every",
            "1",
            "--log.trace",
        ),
        *("--optimizer.warmup", "0"),
    ]


def check(out: Path, steps: int) -> None:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps and all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert (out / "ema.safetensors").stat().st_size == pytest.approx(4 * 109_466_115, rel=0.01)


SMALL = "--model.channels 32 32 --model.attention none cross --model.heads 2 2 --model.blocks 1 1 --model.depth 1 1"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_frozen_encoder_goes_with_the_precision_of_what_is_trained(precision, shards, clip, tmp_path, monkeypatch):
    """DeepSpeed only casts trained weights: the first step would multiply fp32 tokens by bf16 weights."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    half = ["--speed.precision", precision, "--speed.threads", "1", "--preview.every", "2"]
    train(recipe_of([*flags(shards, clip, tmp_path / "run", 16, 2, 2), *SMALL.split(), *half]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    assert list((tmp_path / "run" / "previews").glob("*.png"))


@pytest.mark.long
def test_the_full_network_trains_on_captioned_photographs(shards, clip, tmp_path):
    """109.5 M parameters, frozen CLIP, two steps; at 32 px, so that it takes seconds."""
    recipe = recipe_of(flags(shards, clip, tmp_path / "run", 32, 2, 2))
    train(recipe)
    check(tmp_path / "run", 2)


@pytest.mark.long
def test_the_full_network_trains_at_its_own_size(shards, clip, tmp_path):
    recipe = recipe_of(flags(shards, clip, tmp_path / "run", 128, 2, 3))
    train(recipe)
    check(tmp_path / "run", 3)


def test_every_caption_of_an_image_is_drawn(shards):
    from duotone.data.shards import Shards
    from duotone.engine import draws

    data = Shards(shards=shards, size=32).open(torch.device("cpu"))
    batch = data.read(draws.plan(0, np.arange(40), data.count))
    assert set(batch.captions) == {"a temple", "an old palace", "a flower"}
    assert batch.captions.count("a flower") == 20
    data.close()


def test_a_caption_longer_than_clip_takes_names_what_was_cut(clip):
    """75 tokens fit between its start and end marks: of 80 one-letter words only the last five are cut and named."""
    from duotone.engine.conditioning.base import Facts
    from duotone.engine.conditioning.text import ClipText
    from duotone.engine.model.unet import UNetConfig

    text = ClipText(encoder=str(clip)).build(UNetConfig(), Facts())
    words = ["a"] * 75 + list("bcdef")
    with pytest.warns(UserWarning, match=r"longer than the text encoder takes; cut: 'b c d e f ?'"):
        long = text.of_values([" ".join(words)])
    assert torch.equal(long["ids_NM"], text.of_values([" ".join(words[:75])])["ids_NM"])


def test_the_doctor_gives_the_encoder_each_caption_once(clip, monkeypatch):
    """And it names the planted normal dropout. A few of its rows are encoded here, as all hold the same captions."""
    from transformers import CLIPTextModel

    from duotone.engine import draws
    from duotone.engine.doctor import conditions
    from duotone.engine.doctor import patient as patients

    uniform, forward, seen = draws.uniform, CLIPTextModel.forward, []

    def normal(seed, positions_N, purpose, count=1):
        u = uniform(seed, positions_N, purpose, count)
        return torch.special.ndtri(u) if purpose == draws.Purpose.DROP else u

    def watched(self, input_ids, **others):
        seen.extend(input_ids.tolist())
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(draws, "uniform", normal)
    monkeypatch.setattr(CLIPTextModel, "forward", watched)
    for module in (conditions, patients):
        monkeypatch.setattr(module, "ROWS", 512)
    patient = patients.Patient(recipe_of(["--conditioning.0.encoder", str(clip)]))
    dropout, says = *conditions.drop_rates(patient), *conditions.says_something(patient)
    assert dropout.level == "fault" and "measured at the network's input 5" in dropout.says and says.level == "fine"
    assert len(seen) == len(set(map(tuple, seen))) == len(set(patient.batch.captions)) == 16


def test_a_frozen_encoder_is_no_part_of_what_is_trained_or_kept(clip):
    from duotone.engine.conditioning.base import Facts
    from duotone.engine.conditioning.text import ClipText
    from duotone.engine.model.unet import UNetConfig

    text = ClipText(encoder=str(clip)).build(UNetConfig(), Facts())
    assert not list(text.parameters()) and not text.state_dict()
    tensors = text.of_values(["a red kite", "two words, three"])
    assert tensors["ids_NM"].shape == (2, 77) and tensors["mask_NM"].sum(1).tolist()[0] == 10
    kept = text(tensors, torch.tensor([True, False]))
    assert kept.tokens_NMD[1].abs().max() == 0 and kept.tokens_NMD[0].abs().max() > 0
    text.to(torch.bfloat16)
    assert text(tensors, torch.tensor([True, True])).tokens_NMD.dtype == torch.bfloat16
