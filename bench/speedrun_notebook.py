"""The other side of the speedrun: the loop of Hugging Face's diffusion-models-class, unit 2, written here from its description.

diffusers' UNet2DModel with the class as four embedded channels beside the image, DDPM with 1000 steps of the cosine
schedule, Adam at 1e-3, batch 128. Its own sampling takes 1000 steps per image; here its samples come from diffusers'
DDIM, without guidance, since labels are never dropped in its training.

python bench/speedrun_notebook.py --scratch DIR --core-seconds 1000 --kept 3     only trains; bench/speedrun.py measures
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from fashion import CLASSES, DATA, SIDE, shards
from record import refuse
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.engine import pictures
from duotone.engine.evaluate.images import read_splits

SCHEDULE = "squaredcos_cap_v2"


class ClassBesideImage(nn.Module):
    """UNet2DModel on the image and four constant channels that hold the embedded class."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.unet = UNet2DModel(
            sample_size=SIDE,
            in_channels=1 + 4,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x_NCHW: Tensor, time_N: Tensor, labels_N: Tensor) -> Tensor:
        planes_N4HW = self.embedding(labels_N)[:, :, None, None].expand(-1, -1, *x_NCHW.shape[2:])
        return self.unet(torch.cat([x_NCHW, planes_N4HW], dim=1), time_N).sample


def training(scratch: Path, core_seconds: float, kept: int) -> None:
    """Runs the loop for `core_seconds` and saves its weights `kept` times, at equal intervals."""
    torch.manual_seed(0)
    train = read_splits(replace(DATA, shards=shards(scratch, "train")), shards(scratch, "t10k"), 60_000).train
    x_NCHW = torch.from_numpy(train.images_NHWC).permute(0, 3, 1, 2)
    labels_N, scheduler = torch.from_numpy(train.labels_N), DDPMScheduler(1000, beta_schedule=SCHEDULE)
    model = ClassBesideImage()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, done = 0, 0
    while done < kept:
        for places_B in torch.randperm(len(x_NCHW)).split(128):
            clean = x_NCHW[places_B].float() / 255 * 2 - 1
            noise, t = torch.randn_like(clean), torch.randint(0, 999, (len(clean),))
            loss = (model(scheduler.add_noise(clean, noise, t), t, labels_N[places_B]) - noise).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            images += len(places_B)
            used = time.process_time()
            if used >= core_seconds * (done + 1) / kept:
                done += 1
                torch.save(model.state_dict(), scratch / "notebook" / f"images-{images:012d}-{used:.0f}.pt")
                print(f"{used:6.0f} core-seconds  {images:,} images  loss {loss.item():.4f}", flush=True)
                if done == kept:
                    return


@torch.inference_mode()
def samples(model: ClassBesideImage, labels_N: np.ndarray, steps: int) -> np.ndarray:
    """One sample per label, uint8 (N, H, W, C), drawn in `steps` steps of DDIM."""
    random, parts = torch.Generator().manual_seed(1), []
    for labels_B in torch.from_numpy(labels_N).split(100):
        # Clipping x0, as the notebook's own scheduler does: without it DPM-Solver++ saturates an epsilon model on this schedule.
        solver = DDIMScheduler(1000, beta_schedule=SCHEDULE, clip_sample=True)
        solver.set_timesteps(steps)
        x_NCHW = torch.randn(len(labels_B), 1, SIDE, SIDE, generator=random)
        for t in solver.timesteps:
            x_NCHW = solver.step(model(x_NCHW, t, labels_B), t, x_NCHW).prev_sample
        parts.append(pictures.pixels(x_NCHW))
    return np.concatenate(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of bench/speedrun.py")
    parser.add_argument("--core-seconds", type=float, default=1000, help="budget of the training")
    parser.add_argument("--kept", type=int, default=3, help="how many times the weights are saved during training")
    arguments = parser.parse_args()
    if arguments.core_seconds <= 0 or arguments.kept < 1:
        refuse("--core-seconds must be above 0 and --kept at least 1")
    (arguments.scratch / "notebook").mkdir(parents=True, exist_ok=True)
    try:
        training(arguments.scratch, arguments.core_seconds, arguments.kept)
    except Refused as refused:
        refuse(str(refused))
