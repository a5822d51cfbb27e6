"""The `duotone` command: finds the class of a sub-command, fills it from the flags, runs it.

A sub-command is a dataclass whose fields are its flags, or, if it works on a recipe, a function that takes the recipe's
flags. Each is in a file of engine/commands or data/prepare, imported on use.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.whole_file import file_system_message
from duotone.engine.log import say_warnings_plainly
from duotone.engine.own_file import import_file

PREPARE = {
    "coco": ("duotone.data.prepare.coco", "PrepareCoco", "COCO captions and images"),
    "folder": ("duotone.data.prepare.image_folder", "PrepareFolder", "a folder of pictures; sub-folders are classes"),
    "idx": ("duotone.data.prepare.idx", "PrepareIdx", "MNIST-format files: MNIST, Fashion-MNIST"),
    "cifar10": ("duotone.data.prepare.cifar10", "PrepareCifar10", "CIFAR-10, binary or Python version"),
    "celeba": ("duotone.data.prepare.celeba", "PrepareCeleba", "CelebA with its attributes"),
}

COMMANDS = {
    "sample": ("Sample", "draw pictures with a trained model (a run's folder or its ema.safetensors)"),
    "export": ("Export", "write one safetensors file, or a folder that diffusers loads"),
    "evaluate": ("Evaluate", "measure a trained model against its data, or its captions"),
}

RECIPES = {
    "doctor": "find what is wrong with a recipe before it costs a run",
    "estimate": "print parameters, arithmetic, memory and disk of a recipe",
}

USAGE = f"""usage: duotone [--with FILE] COMMAND [flags]

  prepare WHAT    make WebDataset shards: {", ".join(PREPARE)}
{chr(10).join(f"  {name + ' RUN':15} {text}" for name, (_, text) in COMMANDS.items())}
{chr(10).join(f"  {name + ' RECIPE':15} {text}" for name, text in RECIPES.items())}

duotone COMMAND --help lists the flags. --with imports a Python file first, for example one that registers your parts."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the `duotone` command; refused input gives one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            say_warnings_plainly()
            dispatch(arguments)
    except Refused as refusal:
        print(f"duotone: refused: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nduotone: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        line = file_system_message(error)
        if line is None:
            raise
        print(f"duotone: refused: {line}", file=sys.stderr)
        sys.exit(2)


def dispatch(arguments: list[str]) -> None:
    while arguments and arguments[0] == "--with":
        import_parts(arguments[1:2])
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, rest = arguments[0], arguments[1:]
    if command == "prepare":
        prepare(rest)
    elif command in COMMANDS:
        on_a_model(command, rest)
    elif command in RECIPES:
        on_a_recipe(command, rest)
    else:
        raise Refused(f"unknown command {command!r}: give one of prepare, {', '.join([*COMMANDS, *RECIPES])}")


def import_parts(given: list[str]) -> None:
    """Imports a user's file; parts that it registers can be loaded."""
    if not given or not Path(given[0]).is_file():
        raise Refused(f"--with {' '.join(given)}: there is no such file; give a Python file and then the command")
    try:
        import_file(Path(given[0]))
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        raise Refused(f"--with {given[0]} cannot be imported ({type(error).__name__}: {error})") from None


def on_a_model(command: str, rest: list[str]) -> None:
    """Runs a command whose first argument is a run's folder or file."""
    wants_help = any(a in ("-h", "--help") for a in rest)
    if not wants_help and (not rest or rest[0].startswith("-")):
        raise Refused(f"duotone {command} needs a run's folder or an ema.safetensors as its first argument")
    flags = [a for a in rest if a in ("-h", "--help")] if wants_help else rest[1:]
    cls = getattr(importlib.import_module(f"duotone.engine.commands.{command}"), COMMANDS[command][0])
    flags_of(cls, flags, f"duotone {command} RUN").run(None if wants_help else Path(rest[0]))


def on_a_recipe(command: str, rest: list[str]) -> None:
    """Runs a command whose first argument is a recipe's file or a run's folder; its flags are the recipe's own."""
    if rest in (["-h"], ["--help"]):
        print(f"usage: duotone {command} RECIPE [the recipe's flags]\n\n  {RECIPES[command]}\n")
        print("RECIPE is a recipe's file or a run's folder; duotone", command, "RECIPE --help lists its flags.")
        return
    if not rest or rest[0].startswith("-"):
        raise Refused(f"duotone {command} needs a recipe's file or a run's folder as its first argument")
    importlib.import_module(f"duotone.engine.commands.{command}").run(Path(rest[0]), rest[1:])


def prepare(rest: list[str]) -> None:
    if not rest or rest[0] in ("-h", "--help"):
        print("usage: duotone prepare WHAT [flags]\n")
        print("\n".join(f"  {name:8}  {text}" for name, (_, _, text) in PREPARE.items()))
        return
    if rest[0] not in PREPARE:
        raise Refused(f"unknown data {rest[0]!r}: give one of {', '.join(PREPARE)}")
    module, cls, _ = PREPARE[rest[0]]
    summary = flags_of(getattr(importlib.import_module(module), cls), rest[1:], f"duotone prepare {rest[0]}").run()
    print(json.dumps(summary, default=str))


def flags_of(cls: type, flags: list[str], name: str):
    """An instance of the dataclass from its flags; a mistake is refused in one line."""
    from duotone.engine.command_line import parse

    return parse(cls, flags, name=name)


if __name__ == "__main__":
    main()
