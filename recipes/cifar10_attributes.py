"""CIFAR-10 by class with the network of celeba_hq_attributes.py: four levels from 32 px to a bottleneck of 2, FiLM.

duotone prepare cifar10 --source cifar-10-batches-bin --out shards/cifar10
deepspeed recipes/cifar10_attributes.py --data.shards shards/cifar10

Follows ntat/Class-Conditional-Diffusion, which uses the same network for CelebA-HQ and CIFAR-10: cosine schedule,
epsilon, bf16, EMA, class as a one-hot vector that attention reads at the bottleneck, one FiLM projection for all
blocks. Fixed here: the class is dropped for 10 % of the images, so guidance works (the original never drops it).
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

recipe = Recipe(
    name="cifar10_attributes",
    data=Shards(size=32, resize="none"),
    conditioning=(Label(port="tokens", encoding="one_hot", dropout=0.1),),
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
    batch_size=128,
    images=100_000 * 128,
    flip=True,
    checkpoint=Checkpoints(every=5_000 * 128, keep=2),
    preview=Previews(every=5_000 * 128, steps=50, sampler="ancestral", guidance=1.5, columns=10),
)

if __name__ == "__main__":
    main(recipe, small_label)
