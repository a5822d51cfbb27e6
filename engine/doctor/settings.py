"""Settings that contradict each other, or that nothing reads."""

from collections.abc import Iterator
from dataclasses import fields

from duotone.engine.conditioning.image import ClassMap
from duotone.engine.doctor.patient import Finding, Patient
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM


def warm_up(patient: Patient) -> Iterator[Finding]:
    """Checks the warm-up, which is counted in images, not in steps, and not multiplied by ranks."""
    recipe = patient.recipe
    warmup, share = recipe.optimizer.warmup, recipe.optimizer.warmup / recipe.images
    if share >= 1:
        says = f"{warmup:,} images, but the run ends at {recipe.images:,}: optimizer.lr is never reached"
        yield Finding("fault", "optimizer.warmup", says)
    elif share > 0.25:
        yield Finding("warning", "optimizer.warmup", f"{share:.0%} of the run: {warmup:,} of {recipe.images:,} images")
    else:
        yield Finding("fine", "optimizer.warmup", f"{share:.1%} of the run")


def averaging(patient: Patient) -> Iterator[Finding]:
    """Checks that the EMA has forgotten its initial weights by the end."""
    recipe = patient.recipe
    kept, images = 1.0, 0
    stride = max(1, recipe.images // recipe.batch_size // 2000)
    for step in range(stride, recipe.images // recipe.batch_size + 1, stride):
        images = step * recipe.batch_size
        kept *= recipe.ema.decay(images, recipe.batch_size) ** stride
    if kept > 0.01:
        says = f"the exported weights will still be {kept:.0%} the random ones of the start: shorten ema.half_life"
        yield Finding("fault", "ema", says)
    else:
        yield Finding("fine", "ema", f"the initial weights have a share of {kept:.1g} at the end")


def batches(patient: Patient) -> Iterator[Finding]:
    """Checks that the batch divides among ranks, and that the data holds at least one batch."""
    recipe = patient.recipe
    uneven = [ranks for ranks in (2, 4, 8) if recipe.batch_size % (ranks * (recipe.accumulation or 1))]
    if uneven:
        listed = ", ".join(map(str, uneven))
        says = f"{recipe.batch_size} with accumulation {recipe.accumulation or 1} does not divide among {listed} ranks"
        yield Finding("warning", "batch_size", says)
    else:
        yield Finding("fine", "batch_size", f"{recipe.batch_size} divides among 2, 4 and 8 ranks")
    if patient.data is not None and patient.data.count < recipe.batch_size:
        says = f"{recipe.batch_size}, but the data has {patient.data.count}: an image is used several times in a step"
        yield Finding("warning", "batch_size", says)


def without_effect(patient: Patient) -> Iterator[Finding]:
    """Warns of fields that are set but have no effect because of another field."""
    silent = list(unread(patient.recipe))
    for name, why in silent:
        yield Finding("warning", name, f"is set, but has no effect: {why}")
    if not silent:
        yield Finding("fine", "settings", "none is set without effect")


def unread(recipe) -> Iterator[tuple[str, str]]:
    ema, objective = recipe.ema, recipe.objective
    if ema.power > 0:
        yield from ((f"ema.{n}", "ema.power is above 0") for n in changed(ema) & {"half_life", "rampup"})
    elif "max_decay" in changed(ema):
        yield "ema.max_decay", "ema.power is 0"
    if isinstance(objective, DDPM) and "gamma" in changed(objective) and "min_snr" not in objective.weighting:
        yield "objective.gamma", f"objective.weighting is {objective.weighting}"
    if recipe.speed.compile is False:
        yield from ((f"speed.{n}", "speed.compile is off") for n in changed(recipe.speed) & {"backend", "autotune"})
    if recipe.drop_together and not recipe.conditioning:
        yield "drop_together", "there is no condition"
    if recipe.preview.prompts and not recipe.wants_captions:
        yield "preview.prompts", "no condition is text"
    kinds = [condition.kind for condition in recipe.conditioning]
    if recipe.preview.attributes and "attributes" not in kinds:
        yield "preview.attributes", "no condition is of attributes"
    if recipe.preview.sheets and not {"label", "class_map"}.issuperset(kinds or ["none"]):
        yield "preview.sheets", "classes are not all that the network is conditioned on"
    if recipe.preview.noisy and not recipe.preview.strips:
        yield "preview.noisy", "preview.strips is off"
    if recipe.log.wandb_pictures and not recipe.log.wandb:
        yield "log.wandb_pictures", "log.wandb is off"
    if "crop" in changed(recipe.data) and recipe.data.resize != "crop":
        yield "data.crop", f"data.resize is {recipe.data.resize}"
    for i, condition in enumerate(recipe.conditioning):
        if isinstance(condition, ClassMap) and condition.encoding == "one_hot" and "width" in changed(condition):
            yield f"conditioning.{i}.width", f"conditioning.{i}.encoding is one_hot: a channel per class"
    yield from ((f"model.{n}", "no level and no middle has attention") for n in of_attention(recipe.model))
    if objective.stratified and recipe.batch_size == 1:
        yield "objective.stratified", "a batch holds one image"
    if not recipe.validation.every:
        yield from ((f"validation.{n}", "validation.every is 0") for n in changed(recipe.validation))
    for name in ("checkpoint", "preview", "validation"):
        if recipe.images < getattr(recipe, name).every != type(getattr(recipe, name))().every:
            yield f"{name}.every", f"the run ends at {recipe.images:,} images"


def of_attention(model: UNetConfig) -> Iterator[str]:
    """Fields set for attention in a network that has none; one with an entry per level counts as unset if all are 1."""
    if {*model.attention, model.middle} & {"self", "cross"}:
        return
    for name in ("heads", "depth"):
        if set(getattr(model, name)) not in ({1}, set(getattr(UNetConfig, name))):
            yield name
    if "context_width" in changed(model):
        yield "context_width"


def changed(config) -> set[str]:
    """Fields that differ from their defaults."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default}


CHECKS = (warm_up, averaging, batches, without_effect)
