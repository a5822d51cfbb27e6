"""Small recipes for the embedded captioned shapes: what a recipe file trains without data, or with --small.

Sized for minutes on two CPU cores; colours and shapes show whether a condition is followed.
"""

from dataclasses import replace

from duotone.data.shards import Shards
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.image import ClassMap
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizers.ema import Ema
from duotone.engine.optimizers.muon import Muon
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe

small_text = Recipe(
    name="captioned_shapes",
    data=Shards(size=16),
    conditioning=(ByteText(width=64, dropout=0.1),),
    # At 16 px colours and shapes are decided at high noise, so training draws it more often than Karras et al. do.
    objective=EDM(sigma_data=0.6, log_mean=0.8, log_std=1.2),
    model=UNetConfig(
        channels=(48, 64),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=64,
        groups=16,
    ),
    optimizer=Muon(lr=4e-3, weight_decay=1e-4, clip=1.0, warmup=1600),
    ema=Ema(half_life=6_400, rampup=0.1),
    batch_size=16,
    images=24_000,
    checkpoint=Checkpoints(every=8_000, keep=2),
    preview=Previews(every=8_000, guidance=2.0, steps=12),
)

small_plain = replace(
    small_text,
    name="shapes",
    conditioning=(),
    model=replace(small_text.model, attention=("none", "self"), middle="self", heads=(4, 4)),
)

small_label = replace(
    small_plain,
    name="labelled_shapes",
    conditioning=(Label(dropout=0.1),),
    # With so few images, a class embedding that only shifts the features does not teach its shape; scaling them does.
    model=replace(small_plain.model, film=True),
    images=48_000,
)

small_attributes = replace(small_text, name="shapes_by_attributes", conditioning=(Attributes(dropout=0.1),))

small_concat = replace(
    small_label,
    name="shapes_by_class_map",
    conditioning=(ClassMap(width=4, dropout=0.1),),
    model=replace(small_label.model, extra_channels=4),
)
