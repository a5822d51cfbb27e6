"""`duotone evaluate RUN`: measure a trained model."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.whole_file import write_json
from duotone.engine.evaluate.classifier import ClassifierConfig
from duotone.engine.evaluate.features import FeaturesConfig
from duotone.engine.evaluate.sample_settings import SampleSettings
from duotone.engine.run_folder import made, refuse_unwritable
from duotone.engine.speed import SAMPLING, Speed


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the real images are; their size, channels and framing are those of the run."""

    shards: Path | None = None
    """Folder of shards; by default the run's own, if it still exists."""
    threads: int = 2
    """Decoding threads."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(SampleSettings):
    """Measure a trained model against its data: Frechet and kernel distance, precision and recall, whether a classifier
    sees what was asked for, the loss by noise level and class, the nearest training image of every sample.

    For a model of the embedded captioned shapes, unless --data.shards is given, the pixels are read instead: does each
    picture show what its caption says?
    """

    data: Data = Data()
    test: Path | None = None
    """Shards of the test set; by default DIR/test if it exists, else the run's held-out split (data.held_out), else a
    tenth of the training set."""
    samples: int = 1000
    """Pictures drawn, with the conditions of as many training images."""
    floor: int | None = None
    """Real images whose distance is reported as the floor; by default as many as samples; fewer give a larger floor."""
    guidance: float | None = None
    """Guidance scale; by default 2, or 1 if conditions were never dropped in training."""
    features: FeaturesConfig = FeaturesConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    loss_images: int = 512
    """Held-out images for the table of losses; 0 = no table."""
    loss_levels: int = 8
    """Noise levels in that table."""
    most: int = 60_000
    """The most images read from each set."""
    cache: Path | None = None
    """Folder for the trained classifier and the features of real images; by default ~/.cache/duotone."""
    out: Path | None = None
    """Folder for evaluation.json and the pictures; by default `evaluation` in the run's folder."""
    json: Path | None = None
    """Also write the result here."""
    per_caption: int = 1
    """Pictures of each caption, for the embedded captioned shapes."""
    speed: Speed = SAMPLING
    """Device, precision and switches: bf16 on a GPU, fp32 on a CPU."""

    def run(self, path: Path) -> None:
        from duotone.engine.artifact import load

        model = load(path, speed=self.speed)
        guidance = (2.0 if model.can_be_guided else 1.0) if self.guidance is None else self.guidance
        resolved = dataclasses.replace(self, guidance=guidance)
        resolved.refuse_without_effect()
        resolved.measure(path, model)

    def measure(self, path: Path, model) -> None:
        if self.json is not None:
            refuse_unwritable(self.json.parent, "--json")
            if self.json.is_dir():
                raise Refused(f"--json {self.json}: it is a folder; give a file")
        if self.data.shards is None and draws_captioned_shapes(model):
            self.refuse_unread(AGAINST_DATA, "of captioned shapes, which reads their pixels")
            self.obedience(model)
        else:
            self.refuse_unread(("per_caption",), "against data")
            self.against_data(path, model)

    def refuse_unread(self, names: tuple[str, ...], where: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(Evaluate(), name):
                raise Refused(f"--{name.replace('_', '-')} has no effect on a measurement {where}: leave it out")

    def against_data(self, path: Path, model) -> None:
        from duotone.engine import run_folder
        from duotone.engine.evaluate import evaluation, images, report

        folder, name = place_of(path)
        if self.most < 2 or self.samples < 1:
            raise Refused(f"most = {self.most}, samples = {self.samples}: give --most 2 and --samples 1 or more")
        shards = self.data.shards or shards_of(folder)
        framed = dataclasses.replace(model.recipe.data, shards=shards, threads=self.data.threads)
        out = self.out or folder / name
        refuse_unwritable(out, "--out")
        refuse_unwritable(self.cache or default_cache(), "--cache")
        if framed.held_out and (folder / "splits.json").exists():
            images.refuse_other_split(framed, run_folder.held_out_keys(folder), folder / "splits.json")
        splits = images.read_splits(framed, self.test, self.most)
        result = evaluation.evaluate(model, splits, self.settings())
        print(report.table(result, splits))
        written = report.draw(result, splits, out)
        values = {"command": self.command(), **evaluation.to_json(result, splits, model)}
        for target in [out / "evaluation.json", *([self.json] if self.json else [])]:
            made(target.parent)
            write_json(target, values)
        print(f"\nwritten: {out / 'evaluation.json'}, {', '.join(str(p) for p in written)}")

    def settings(self):
        from duotone.engine.evaluate.evaluation import Settings

        shared = {field.name for field in dataclasses.fields(Settings)} - {"cache"}
        return Settings(**{name: getattr(self, name) for name in shared}, cache=self.cache or default_cache())

    def command(self) -> str:
        """The command without the paths of this machine."""
        test = " --test DIR" if self.test else ""
        always = ("samples", "guidance", "steps", "sampler", "seed")
        rest = (*STEERING, "floor", "features", "classifier", "loss_images", "loss_levels", "most")
        return " ".join([f"duotone evaluate RUN --data.shards DIR{test}", *self.flags(always, rest)])

    def flags(self, always: tuple[str, ...], rest: tuple[str, ...]) -> list[str]:
        """The flags of the settings in `always`, and of those in `rest` that differ from their defaults."""
        defaults = dict.fromkeys(always) | {name: getattr(Evaluate(), name) for name in rest}
        return [flag for name, default in defaults.items() for flag in flags_for(name, getattr(self, name), default)]

    def obedience(self, model) -> None:
        """Measures the captioned shapes by reading them from the pixels."""
        from duotone.engine.evaluate.captioned_shapes import obedience

        result = obedience(model, self, per_caption=self.per_caption)
        values = dataclasses.asdict(result)
        checker = values.pop("checker")
        print(f"{result.samples} pictures, {self.per_caption} for each caption, guidance {self.guidance}")
        for name, value in list(values.items())[1:]:
            own = f"   (checker on real renders: {checker[name]:.1%})" if name in checker else ""
            print(f"  {name.replace('_', ' '):24} {value:6.1%}{own}")
        if self.json:
            made(self.json.parent)
            always = ("per_caption", "guidance", "steps", "sampler", "seed")
            write_json(
                self.json,
                {
                    "command": " ".join(["duotone evaluate RUN", *self.flags(always, STEERING)]),
                    **values,
                    "checker": checker,
                },
            )


STEERING = ("interval", "rescale", "rule", "spacing", "clip")
"""Settings that a result's command names only if they differ from their defaults."""

AGAINST_DATA = (
    "test",
    "samples",
    "floor",
    "features",
    "classifier",
    "loss_images",
    "loss_levels",
    "most",
    "cache",
    "out",
)
"""Settings that only a measurement against data uses."""


def flags_for(name: str, value, default) -> list[str]:
    """The flags of a setting that differs from its default; a path is written as PATH."""
    if value == default:
        return []
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return [flag for f in fields for flag in flags_for(f"{name}.{f}", getattr(value, f), getattr(default, f))]
    part, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool) and default is not None:  # one that may be None takes True or False as a word
        return [f"--{part}{dot}{'' if value else 'no-'}{last}"]
    written = "PATH" if isinstance(value, Path) else " ".join(map(str, value if isinstance(value, tuple) else [value]))
    return [f"--{part}{dot}{last} {written}"]


def place_of(path: Path) -> tuple[Path, str]:
    """The run's folder, and a name in it for the evaluation: a checkpoint is removed later, with all that is in it."""
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "checkpoints":
        return folder.parent.parent, f"evaluation-{folder.name}"
    return folder, "evaluation"


def draws_captioned_shapes(model) -> bool:
    """Whether the model takes captions only, and its data has the classes and attributes of the embedded set."""
    from duotone.data.captioned_shapes import ATTRIBUTES, SHAPES

    told = {conditioner.keyword for conditioner in model.network.conditioners.values()}
    facts = model.facts
    return told == {"prompts"} and (facts.classes, facts.attributes) == (tuple(SHAPES), tuple(ATTRIBUTES))


def shards_of(folder: Path) -> Path:
    """The data that a run was trained on, from its folder; raises Refused if that is unknown or gone."""
    from duotone.engine import run_folder

    stored = run_folder.stored_recipe(folder) if (folder / "recipe.json").exists() else None
    named = stored["data"]["shards"] if stored else None
    if named is None:
        raise Refused(f"{folder} does not say what data it was trained on: give --data.shards DIR")
    if not Path(named).is_dir():
        raise Refused(f"{folder} was trained on {named}, which is not there: give --data.shards DIR")
    return Path(named)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duotone"
