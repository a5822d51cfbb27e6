"""A model card: what anyone who receives the weights must know, from the recipe and the data alone."""

from pathlib import Path

from duotone.data.whole_file import write_whole
from duotone.engine.conditioning.base import Facts
from duotone.engine.exchange import diffusers_config
from duotone.engine.recipe import Recipe

LIMITS = """\
The model has learned the gaps and biases of its data set and may reproduce some training images closely
(`duotone evaluate` shows each sample beside its nearest training image). It has not been evaluated for any use."""


def write(path: Path, recipe: Recipe, facts: Facts, data, images: int, file: str = "ema.safetensors") -> None:
    """Writes the card atomically; it contains no local paths. `file` is the name of the weights file."""
    write_whole(path, card(recipe, facts, images, None if data is None else data.count, file))


def card(recipe: Recipe, facts: Facts, images: int, samples: int | None = None, file: str = "ema.safetensors") -> str:
    return assemble(
        front_matter(recipe), recipe, facts_table(recipe, facts, images, samples), usage(recipe, facts, file)
    )


def card_of_folder(recipe: Recipe, facts: Facts, images: int, config: dict, scheduler: dict, notes: list[str]) -> str:
    """The card of an exported folder, which diffusers loads."""
    names = (config["_class_name"], scheduler["_class_name"])
    use = [
        "```python",
        f"from diffusers import {', '.join(names)}",
        "",
        f'unet = {names[0]}.from_pretrained("this folder", subfolder="unet")',
        f'scheduler = {names[1]}.from_pretrained("this folder", subfolder="scheduler")',
        "```",
        *(["", *(f"- {note}" for note in notes)] if notes else []),
    ]
    told_of = [
        line for line in facts_table(recipe, facts, images, None) if not line.startswith("| as a diffusers folder")
    ]
    front = [line.replace("library_name: duotone", "library_name: diffusers") for line in front_matter(recipe)]
    return assemble(front, recipe, told_of, use)


def assemble(front: list[str], recipe: Recipe, told_of: list[str], use: list[str]) -> str:
    parts = [*front, "", f"# {recipe.name}", "", *told_of, "", "## Use", "", *use, "", "## Limits", "", LIMITS]
    return "\n".join(parts) + "\n"


def front_matter(recipe: Recipe) -> list[str]:
    kinds = [condition.kind for condition in recipe.conditioning]
    tag = "text-to-image" if "text" in kinds else "unconditional-image-generation" if not kinds else "image-generation"
    return ["---", "library_name: duotone", f"tags: [{tag}, diffusion]", "---"]


def facts_table(recipe: Recipe, facts: Facts, images: int, samples: int | None) -> list[str]:
    model, objective, size = recipe.model, recipe.objective, recipe.data.size
    seen = f"{images:,} images" + (f", {images / samples:,.1f} epochs of {samples:,} samples" if samples else "")
    lines = [
        "| | |",
        "| --- | --- |",
        f"| pictures | {size} x {size}, {'colour' if model.out_channels == 3 else 'greyscale'} |",
        f"| conditions | {conditions(recipe)} |",
        f"| objective | {describe_objective(objective)} |",
        f"| network | UNet, channels {', '.join(map(str, model.channels))}, attention {', '.join(model.attention)} |",
        f"| trained on | {seen}, batches of {recipe.batch_size}, seed {recipe.seed}{held_out_note(recipe)} |",
        f"| weights | exponential moving average, {average(recipe)} |",
        f"| as a diffusers folder | {exported(recipe)} |",
    ]
    for what, names in (("classes", facts.classes), ("attributes", facts.attributes)):
        if names:
            lines.append(f"| {what} | {', '.join(names[:40])}{' ...' if len(names) > 40 else ''} |")
    return lines


def held_out_note(recipe: Recipe) -> str:
    return f"; {recipe.data.held_out:.2%} of the data held out" if recipe.data.held_out else ""


def conditions(recipe: Recipe) -> str:
    parts = [f"{c.kind} (dropped for {c.dropout:.0%} of images)" for c in recipe.conditioning]
    return ", ".join(parts) or "none"


def describe_objective(objective) -> str:
    details = {name: getattr(objective, name) for name in ("schedule", "prediction", "weighting", "sigma_data", "times")
               if hasattr(objective, name)}  # fmt: skip
    return type(objective).__name__ + "".join(f", {name} {value}" for name, value in details.items())


def exported(recipe: Recipe) -> str:
    reason = diffusers_config.why_not(recipe)
    return "`duotone export`" if reason is None else f"no, only as a single file: {reason}"


def average(recipe: Recipe) -> str:
    if recipe.ema.power > 0:
        return f"power {recipe.ema.power:.3g}, decay at most {recipe.ema.max_decay}"
    return f"half-life {recipe.ema.half_life:,} images"


def usage(recipe: Recipe, facts: Facts, file: str) -> list[str]:
    asked = {"text": 'prompts=["..."]', "label": f"labels=[{(facts.classes or ['0'])[0]!r}]",
             "class_map": f"labels=[{(facts.classes or ['0'])[0]!r}]",
             "attributes": f"attributes=[[{(facts.attributes or ['name'])[0]!r}]]",
             "low_resolution": "images=[small_HWC]", "hole": "holes=[(image_HWC, mask_HW)]"}  # fmt: skip
    kinds = [condition.kind for condition in recipe.conditioning if condition.kind != "temperature"]
    # Kinds that share an argument of sample() list it once.
    given = list(dict.fromkeys(asked.get(kind, f"{kind}=[...]") for kind in kinds)) or ["count=1"]
    return [
        "```python",
        "from duotone.engine import load, sample",
        "",
        f'images = sample(load("{file}"), {", ".join(given)}, steps={recipe.preview.steps}, seed=0)',
        "```",
    ]
