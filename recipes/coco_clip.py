"""Text to image on COCO 2017 captions: CLIP ViT-B/32, 109.5 M parameters, 128 px, DDPM on epsilon with guidance.

duotone prepare coco --images train2017 --annotations annotations/captions_train2017.json --size 160 --out shards/coco
deepspeed recipes/coco_clip.py --data.shards shards/coco

Without --data.shards, it trains a small network on the embedded captioned shapes. Follows PyTorch-Adventures'
"Conditional Diffusion": same data, encoder, schedule and budget. Fixed here: the original dropped 54 % of the captions
where 10 % was meant, ignored its flag for the clipping norm, and sampled without guidance.
"""

from duotone.data.shards import Shards
from duotone.engine import Recipe, main
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.text import ClipText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.small import small_text

recipe = Recipe(
    name="coco_clip",
    data=Shards(size=128, resize="squash"),
    conditioning=(ClipText(encoder="openai/clip-vit-base-patch32", dropout=0.1),),
    objective=DDPM(schedule="linear", steps=1000, prediction="epsilon"),
    model=UNetConfig(
        channels=(128, 128, 256, 384, 384),
        attention=("none", "cross", "cross", "cross", "cross"),
        heads=(4, 4, 4, 4, 4),
        context_width=512,
    ),
    optimizer=AdamW(lr=1e-4, weight_decay=1e-4, clip=1.0, warmup=2000 * 128, schedule="cosine"),
    ema=Ema(half_life=500 * 128 * 10),
    batch_size=128,
    images=200_000 * 128,
    flip=True,
    checkpoint=Checkpoints(every=500 * 128, keep=2),
    preview=Previews(
        every=500 * 128,
        prompts=(
            "A red kite flying through a cloudy blue sky",
            "A sailboat floating on the ocean",
            "A man with an umbrella walking through the rain",
        ),
        guidance=4.0,
        steps=25,
    ),
)

if __name__ == "__main__":
    main(recipe, small_text)
