"""Your own pictures: class = sub-folder. DDPM on a six-level UNet, any size, up to 512 px with checkpointing.

duotone prepare folder ~/pictures --out shards/mine
deepspeed recipes/image_folder.py --data.shards shards/mine --data.size 64

Follows KetanMann's class-conditioned DDPM script: its network, schedule, weight and power EMA. Fixed here: the original
encodes the class index as a sinusoid (here each class has an embedding row), and never drops classes, so it cannot be
guided.
"""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.label import Label
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.small import small_label
from duotone.engine.speed import Speed

recipe = Recipe(
    name="image_folder",
    data=Shards(size=128, resize="crop", crop="random"),
    conditioning=(Label(dropout=0.1),),
    objective=DDPM(schedule="cosine", steps=1000, prediction="x0", weighting="snr"),
    model=UNetConfig(
        channels=(128, 128, 256, 256, 512, 512),
        attention=("none", "none", "none", "none", "self", "none"),
        middle="self",
        heads=(16, 16, 32, 32, 64, 64),
        blocks=(2, 2, 2, 2, 2, 2),
        depth=(1, 1, 1, 1, 1, 1),
    ),
    optimizer=AdamW(lr=5e-5, betas=(0.95, 0.999), weight_decay=1e-6, clip=1.0, warmup=1000 * 16),
    ema=Ema(power=0.75, max_decay=0.9999),
    speed=Speed(gradient_checkpointing=True),
    batch_size=16,
    images=2_000_000,
    flip=True,
    checkpoint=Checkpoints(every=32_000, keep=2),
    preview=Previews(every=32_000, columns=8, rows=8, sheets=True, steps=50, guidance=1.5),
)

if __name__ == "__main__":
    main(recipe, small_label)
