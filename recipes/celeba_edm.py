"""CelebA without conditions, 128 px, EDM.

duotone prepare celeba --images img_align_celeba --attributes list_attr_celeba.txt --partition list_eval_partition.txt --split train --size 128 --out shards/celeba_train
duotone prepare celeba --images img_align_celeba --attributes list_attr_celeba.txt --partition list_eval_partition.txt --split test --size 128 --out shards/celeba_test
deepspeed recipes/celeba_edm.py --data.shards shards/celeba_train
duotone evaluate runs/celeba_edm --test shards/celeba_test --samples 50000 --floor 9000 --guidance 1 --steps 50 --sampler stochastic_heun --features.network inception

Follows Zenchiyu/diffusion's smallest CelebA run: 64 channels doubling over 1, 2 and 4 blocks, its objective, noise
levels, batch and 125 epochs of 150,000 images. Its published Frechet distance against the test set is 21.89, with a
network of 35.2 M parameters (here 23.0 M); the last command measures it if torch-fidelity's Inception is available.
Fixed here: group instead of batch normalisation; an EMA is kept.
"""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.small import small_plain

recipe = Recipe(
    name="celeba_edm",
    data=Shards(size=128, resize="crop", held_out=12_770 / 162_770),
    objective=EDM(sigma_data=None, log_mean=-1.2, log_std=1.2, sigma_min=0.002, sigma_max=80.0),
    model=UNetConfig(
        channels=(64, 128, 256),
        attention=("none", "none", "self"),
        middle="self",
        heads=(1, 2, 4),
        blocks=(1, 2, 4),
        depth=(1, 1, 1),
    ),
    optimizer=AdamW(lr=1e-4, weight_decay=0.0, clip=0.0, warmup=0, schedule="constant"),
    ema=Ema(half_life=500_000),
    batch_size=32,
    images=585_938 * 32,
    checkpoint=Checkpoints(every=10_000 * 32, keep=2),
    preview=Previews(every=10_000 * 32, steps=50, sampler="stochastic_heun", guidance=1.0),
)

if __name__ == "__main__":
    main(recipe, small_plain)
