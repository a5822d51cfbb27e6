"""CelebA-HQ by attributes, 256 px: multi-hot attributes as tokens, cross-attention at the bottleneck alone, FiLM.

duotone prepare celeba --images CelebA-HQ-img --attributes CelebAMask-HQ-attribute-anno.txt --size 256 --out shards/celeba_hq
deepspeed recipes/celeba_hq_attributes.py --data.shards shards/celeba_hq

Follows ntat/Class-Conditional-Diffusion: cosine schedule, epsilon, bf16, EMA, 256 -> 16 px over four levels and a
bottleneck. Its widths are not published. Fixed here: attributes are dropped for 10 % of the images, so guidance works
(the original never drops them). One FiLM projection serves all blocks, as in the original; diffusers cannot represent
that, so the model exports only as a single file.
"""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.small import small_attributes

recipe = Recipe(
    name="celeba_hq_attributes",
    data=Shards(size=256, resize="crop"),
    conditioning=(Attributes(port="tokens", dropout=0.1, attribute_dropout=0.1),),
    objective=DDPM(schedule="cosine", steps=1000, prediction="epsilon"),
    model=UNetConfig(
        channels=(64, 128, 256, 256, 512),
        attention=("none", "none", "self", "self", "none"),
        middle="cross",
        heads=(4, 4, 4, 4, 8),
        blocks=(2, 2, 2, 2, 2),
        depth=(1, 1, 1, 1, 1),
        context_width=256,
        film=True,
        film_shared=True,
    ),
    optimizer=AdamW(lr=1e-4, warmup=32_000, schedule="constant"),
    ema=Ema(power=2 / 3, max_decay=0.9999),
    batch_size=32,
    images=300_000 * 32,
    flip=True,
    checkpoint=Checkpoints(every=5_000 * 32, keep=2),
    preview=Previews(every=5_000 * 32, steps=50, sampler="ancestral", guidance=1.5),
)

if __name__ == "__main__":
    main(recipe, small_attributes)
