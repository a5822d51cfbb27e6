"""MNIST with the class as four extra input channels: 1.7 M parameters, 28 px, DDPM on epsilon, ten epochs.

duotone prepare idx --images train-images-idx3-ubyte.gz --labels train-labels-idx1-ubyte.gz --names mnist --out shards/mnist
deepspeed recipes/mnist_concat.py --data.shards shards/mnist
python bench/notebook_losses.py runs/mnist_concat

Follows Hugging Face's diffusion-models-class, unit 2: its network, schedule, optimizer and budget. Its losses over the
last 100 batches of each epoch, with which the last command compares ours: 0.0525 0.0460 0.0433 0.0423 0.0412 0.0407
0.0404 0.0394 0.0391 0.0390. Fixed here: the original never trained its last timestep, where sampling begins. Labels are
never dropped, so guidance stays at 1.
"""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.image import ClassMap
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.small import small_concat

recipe = Recipe(
    name="mnist_concat",
    data=Shards(size=28, channels=1, resize="none"),
    conditioning=(ClassMap(encoding="embedding", width=4, dropout=0.0),),
    objective=DDPM(schedule="cosine", steps=1000, prediction="epsilon"),
    model=UNetConfig(
        channels=(32, 64, 64),
        attention=("none", "self", "self"),
        middle="self",
        heads=(4, 8, 8),
        blocks=(2, 2, 2),
        depth=(1, 1, 1),
        in_channels=1,
        extra_channels=4,
        out_channels=1,
        zero_init=False,
    ),
    optimizer=AdamW(lr=1e-3, weight_decay=0.0, clip=0.0, warmup=0, schedule="constant"),
    ema=Ema(half_life=10_000),
    batch_size=128,
    images=4_690 * 128,
    checkpoint=Checkpoints(every=469 * 128, keep=2),
    preview=Previews(every=469 * 128, steps=50, sampler="ancestral", guidance=1.0, columns=8),
)

if __name__ == "__main__":
    main(recipe, small_concat)
