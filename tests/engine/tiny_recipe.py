"""A run of seconds for the tests: two levels, byte text and labels, 16 px."""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews

recipe = Recipe(
    name="tiny",
    data=Shards(size=16),
    conditioning=(ByteText(width=16, layers=1, heads=2, length=48, pooled=False, dropout=0.3), Label(dropout=0.2)),
    objective=EDM(),
    model=UNetConfig(
        channels=(16, 16),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=16,
        groups=8,
        zero_init=False,
    ),
    optimizer=AdamW(lr=2e-3, warmup=16),
    ema=Ema(half_life=64),
    batch_size=8,
    accumulation=2,
    images=96,
    flip=True,
    checkpoint=Checkpoints(every=16),
    preview=Previews(every=0, columns=2, rows=2, steps=2, strips=False),
    log=Log(every=1, trace=True),
)

if __name__ == "__main__":
    main(recipe)
