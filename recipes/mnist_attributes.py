"""MNIST by class with FiLM and no attention, 28 px.

duotone prepare idx --images train-images-idx3-ubyte.gz --labels train-labels-idx1-ubyte.gz --names mnist --out shards/mnist
deepspeed recipes/mnist_attributes.py --data.shards shards/mnist

Follows ntat/Class-Conditional-Diffusion's MNIST run: a small UNet without attention, cosine schedule, epsilon, EMA,
class as a one-hot vector, one FiLM projection for all blocks; its widths are not published. Fixed here: the class is
dropped for 10 % of the images, so guidance works (the original never drops it).
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
    name="mnist_attributes",
    data=Shards(size=28, channels=1, resize="none"),
    conditioning=(Label(encoding="one_hot", dropout=0.1),),
    objective=DDPM(schedule="cosine", steps=1000, prediction="epsilon"),
    model=UNetConfig(
        channels=(32, 64, 64),
        attention=("none", "none", "none"),
        middle="none",
        heads=(1, 1, 1),
        blocks=(2, 2, 2),
        depth=(1, 1, 1),
        in_channels=1,
        out_channels=1,
        film=True,
        film_shared=True,
    ),
    optimizer=AdamW(lr=1e-3, warmup=12_800, schedule="constant"),
    ema=Ema(power=2 / 3, max_decay=0.9999),
    batch_size=128,
    images=9_380 * 128,
    checkpoint=Checkpoints(every=938 * 128, keep=2),
    preview=Previews(every=938 * 128, steps=50, sampler="ancestral", guidance=1.5, columns=10),
)

if __name__ == "__main__":
    main(recipe, small_label)
