"""A run's log: metrics.jsonl comes first; the progress bar, TensorBoard and wandb only listen."""

import contextlib
import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duotone.data.refusal import SampleReplaced, at_least
from duotone.data.whole_file import write_whole
from duotone.engine.run_folder import keep_rows_up_to


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where a run's numbers go besides metrics.jsonl."""

    every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    wandb: bool = False
    """Follow the run in Weights & Biases (WANDB_MODE=offline works); only numbers and the recipe are sent."""
    wandb_pictures: bool = False
    """Send its sheets and strips too; those of a model that restores images show images of the data."""
    tensorboard: bool = False
    """Write TensorBoard events, sheets and strips included, into the run's folder."""
    trace: bool = False
    """Write trace.jsonl: for each step the image count, the sample keys and a hash of the random draws."""

    def check(self) -> None:
        at_least("log.every", self.every, 1)


@dataclass
class Window:
    """What happened since the last line."""

    began: float
    images: int = 0
    waited: float = 0.0


def say(line: str) -> None:
    """Prints one line outside of a run's log, on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        printed(f"duotone: {line}")


def say_warnings_plainly() -> None:
    """Prints this package's warnings as one line each, without the code that raised them; others stay as they are."""
    others = warnings.showwarning

    def show(message, category, *where) -> None:
        if not category.__module__.startswith("duotone."):
            others(message, category, *where)
            return
        of_this_rank = issubclass(category, SampleReplaced)  # each rank reads its own samples
        if of_this_rank or int(os.environ.get("RANK", 0)) == 0:
            print(f"duotone: warning: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = show


class Logger:
    """Writes and prints a run's log on rank 0; on other ranks it only counts."""

    def __init__(self, config: Log, folder: Path, total: int, start: int, *, speaks: bool, recipe: dict):
        self.config, self.folder, self.total, self.speaks = config, folder, total, speaks
        self.window = Window(time.monotonic())
        self.listeners: list = []
        if not speaks:
            return
        keep_rows_up_to(folder / "metrics.jsonl", start)
        keep_rows_up_to(folder / "trace.jsonl", start)
        keep_rows_up_to(folder / "validation.jsonl", start)
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.bar = Bar(total, start)
        if config.tensorboard:
            self.begin(tensorboard, folder)
        if config.wandb:
            self.begin(wandb, folder, recipe, config.wandb_pictures)

    def begin(self, tracker: Callable, *arguments) -> None:
        """Starts a tracker; if that fails, prints one line and the run continues without it."""
        try:
            self.listeners.append(tracker(*arguments))
        except Exception as error:  # noqa: BLE001 - as below
            self.say(f"{tracker.__name__} does not start, metrics.jsonl continues: {type(error).__name__}: {error}")

    def say(self, line: str) -> None:
        if self.speaks:
            self.bar.say(f"duotone: {line}")

    def waited(self, seconds: float) -> None:
        self.window.waited += seconds

    def step(self, step: int, images: int, batch: int, numbers) -> None:
        """Counts one optimizer step; `numbers()`, which waits for the device, is called only if a line is due."""
        self.window.images += batch
        due = step % self.config.every == 0 or images >= self.total or step == 1
        if due:
            values = numbers()
            if self.speaks:
                self.line(step, images, values)

    def line(self, step: int, images: int, values: dict[str, float]) -> None:
        seconds = max(time.monotonic() - self.window.began, 1e-9)
        row = {
            "step": step,
            "images": images,
            **values,
            "images_per_second": self.window.images / seconds,
            "data_wait": self.window.waited / seconds,
        }
        self.window = Window(time.monotonic())
        self.metrics.write(as_json(row))
        self.bar.update(row)
        for listener in list(self.listeners):
            self.tell(listener, row)

    def tell(self, listener, row: dict) -> None:
        """Passes a row to a tracker; one that fails is dropped with one line, and the run continues."""
        try:
            listener(row)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises must not end a run
            self.listeners.remove(listener)
            self.say(f"a tracker failed and is dropped, metrics.jsonl continues: {type(error).__name__}: {error}")

    def validated(self, row: dict) -> None:
        """Writes a row of validation.jsonl, replacing one of as many images, and reports its mean loss."""
        keep_rows_up_to(self.folder / "validation.jsonl", row["images"] - 1)
        with open(self.folder / "validation.jsonl", "a") as file:
            file.write(as_json(row))
        self.say(f"loss on held-out images after {row['images']:,}: {row['loss']:.4f}")
        for listener in list(self.listeners):
            self.tell(listener, {"images": row["images"], "validation_loss": row["loss"]})

    def drawn(self, images: int, pictures: list[Path]) -> None:
        """Passes pictures to the trackers: images-N.png as "samples", images-N-conditional.png as "conditional"."""
        sheets = {(path.stem.split("-") + ["samples"])[2]: path for path in pictures if path.suffix == ".png"}
        for listener in list(self.listeners):
            self.tell(listener, {"images": images, **sheets})

    def measured(self, images: int) -> bool:
        """Whether validation.jsonl has a row of this many images."""
        path = self.folder / "validation.jsonl"
        return path.exists() and any(json.loads(row)["images"] == images for row in path.read_text().splitlines())

    def trace(self, row: dict) -> None:
        if self.speaks:
            with open(self.folder / "trace.jsonl", "a") as file:
                file.write(as_json(row))

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
            self.metrics.close()
            for listener in self.listeners:
                with contextlib.suppress(Exception):  # an external service may fail; all that counts is on the disk
                    listener.close()


def as_json(row: dict) -> str:
    """A line of a jsonl file; NaN and infinity, as of a skipped step's norm or a diverged loss, become null."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(row)) + "\n"


class Bar:
    """A progress bar on a terminal; elsewhere one line about every ten seconds."""

    def __init__(self, total: int, start: int):
        self.total, self.start, self.last_line = total, start, 0.0
        self.began = time.monotonic()
        self.tqdm = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.tqdm = tqdm(
                total=total, initial=start, unit="img", unit_scale=True, smoothing=0.05, dynamic_ncols=True
            )

    def say(self, line: str) -> None:
        if self.tqdm is not None:
            self.tqdm.write(line)
        else:
            printed(line)

    def update(self, row: dict) -> None:
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(f"loss {row['loss']:.4f}, data wait {row['data_wait']:.0%}")
            self.tqdm.update(row["images"] - self.tqdm.n)
            return
        now = time.monotonic()
        if now - self.last_line > 10 or row["images"] >= self.total:
            self.last_line = now
            printed(plain_line(row, self.total, self.left(row["images"], now)))

    def left(self, images: int, now: float) -> float:
        """Seconds left at the mean rate so far."""
        done = images - self.start
        return (now - self.began) / done * (self.total - images) if done else 0.0

    def close(self) -> None:
        if self.tqdm is not None:
            self.tqdm.close()


def printed(line: str) -> None:
    """Prints a line, ignoring a closed output: a pager that has ended must not end the run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def plain_line(row: dict, total: int, left: float) -> str:
    return (
        f"{row['images']:>9,}/{total:,} images  loss {row['loss']:.4f}  {row['images_per_second']:7.1f} img/s  "
        f"data wait {row['data_wait']:4.0%}  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def tensorboard(folder: Path) -> Callable[[dict], None]:
    from torch.utils.tensorboard import SummaryWriter

    from duotone.engine import pictures

    writer = SummaryWriter(folder / "tensorboard")

    def listen(row: dict) -> None:
        for name, value in row.items():
            if isinstance(value, Path):
                writer.add_image(name, pictures.read(value, channels=3), row["images"], dataformats="HWC")
            elif isinstance(value, int | float) and name not in ("step", "images"):
                writer.add_scalar(name, value, row["images"])
        writer.flush()

    listen.close = writer.close
    return listen


NOTHING_ELSE = dict(
    console="off",
    disable_git=True,
    save_code=False,
    x_disable_machine_info=True,
    x_disable_meta=True,
    x_disable_stats=True,
    x_save_requirements=False,
)
"""Keeps wandb from sending printed output, the command line, the repository's address, packages and machine facts."""


def wandb(folder: Path, recipe: dict, shows: bool) -> Callable[[dict], None]:
    """Sends numbers and the recipe, pictures only if `shows`; a resumed run keeps its id."""
    import wandb as library

    remembered = folder / "wandb_id"
    if not remembered.exists():
        write_whole(remembered, f"{secrets.token_hex(4)}\n")
    known = {"name": folder.resolve().name, "id": remembered.read_text().strip()}
    settings = library.Settings(**NOTHING_ELSE)
    run = library.init(project="duotone", **known, resume="allow", config=recipe, dir=str(folder), settings=settings)

    def listen(row: dict) -> None:
        sheets = {name: library.Image(str(path)) for name, path in row.items() if isinstance(path, Path) and shows}
        numbers = {name: value for name, value in row.items() if not isinstance(value, Path)}
        run.log(numbers | sheets, step=row["images"])

    listen.close = run.finish
    return listen
