"""main(recipe): what a recipe file calls, from the command line to the end of the run."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
import warnings
from dataclasses import replace

from safetensors import SafetensorError
from torch.distributed import DistError

from duotone.data.refusal import Refused
from duotone.data.whole_file import file_system_message
from duotone.engine import checkpoint
from duotone.engine.command_line import parse
from duotone.engine.log import say, say_warnings_plainly
from duotone.engine.recipe import Recipe

ONLY_THIS_RANK = 10
"""Seconds after which a rank that refuses is known to be alone: had rank 0 refused, the launcher would have ended it."""


def main(recipe: Recipe, embedded: Recipe | None = None) -> None:
    """Runs a recipe file: command-line overrides, then training; refused input gives one line and exit code 2.

    `embedded` is the small recipe for the embedded data set: it is used if neither the recipe nor --data.shards names
    data, and with --small also on your own data.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    try:
        recipe = parse(Recipe, without_small(arguments), default=base_of(recipe, embedded, arguments)).placed()
        recipe.check()
        from duotone.engine.train import train

        with warnings.catch_warnings():
            say_warnings_plainly()
            train(recipe)
    except Refused as refusal:
        print_refusal(refusal)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        # The launcher sends SIGTERM after Ctrl-C; the last line must still be printed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print_resume_point(recipe)
        sys.exit(getattr(interrupt, "code", 130))
    except (OSError, SafetensorError) as error:
        line = file_system_message(error)
        if line is None:
            raise
        print_refusal(Refused(line))
        sys.exit(2)
    except RuntimeError as error:
        from duotone.engine.distributed.zero import lost_a_rank

        if lost_a_rank(error):
            # The launcher will end this rank because of the other's fault, and only that fault is worth reporting.
            time.sleep(2 * ONLY_THIS_RANK)
            print_lost_rank(error)
        raise


def print_resume_point(recipe: Recipe) -> None:
    """Prints, on rank 0, where an interrupted run resumes."""
    if int(os.environ.get("RANK", 0)) == 0:
        found = checkpoint.known(recipe.folder / "checkpoints")
        # The newest by time: the last one by name may be damaged.
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        where = f"{recipe.again} resumes from {newest}" if newest else "there is no checkpoint to resume from yet"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\nduotone: interrupted: {where}", file=sys.stderr, flush=True)


def print_refusal(refusal: Refused) -> None:
    """Prints one line for all ranks: rank 0 speaks at once, the others only if the launcher has not ended them by then."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(ONLY_THIS_RANK)
    where = f" on rank {rank} ({socket.gethostname()})" if rank else ""
    print(f"duotone: refused{where}: {refusal}", file=sys.stderr, flush=True)


def print_lost_rank(error: RuntimeError) -> None:
    """Prints that this rank stops because another one ended, and exits; a DistError says more itself and is left to."""
    if not isinstance(error, DistError):
        rank, host = os.environ.get("RANK", 0), socket.gethostname()
        said = re.search(r"Connection \w+ by peer( \[[^]]+\])?|Broken pipe", str(error))[0]
        why = f"another rank has ended, and its own output tells why ({said})"
        print(f"duotone: rank {rank} ({host}) stops: {why}", file=sys.stderr, flush=True)
        sys.exit(1)


def base_of(recipe: Recipe, embedded: Recipe | None, arguments: list[str]) -> Recipe:
    """The recipe to which the command line's overrides are applied."""
    small = "--small" in arguments
    if embedded is None and small:
        raise Refused(f"--small: {recipe.name} has no small network")
    shards = recipe.data.shards
    own = shards is not None or any(a.split("=")[0] == "--data.shards" for a in arguments)
    if small:
        mine = {"name": f"{recipe.name}_small", "data": replace(embedded.data, shards=shards)}
        return replace(embedded, **mine) if own else embedded
    if embedded is not None and shards is None and not {"-h", "--help"}.isdisjoint(arguments):
        say(
            f"the defaults are {recipe.name}'s; without --data.shards, or with --small, a small network is trained instead"
        )
        return recipe
    if embedded is None or own:
        if not own and {"-h", "--help"}.isdisjoint(arguments):
            say("neither data.shards nor --data.shards is given: training on the embedded captioned shapes")
        return recipe
    say(
        f"no --data.shards: training a small network on the embedded captioned shapes. The full {recipe.name} recipe: "
        "duotone prepare --help, then --data.shards DIR (with --small for the small network on your data)"
    )
    return embedded


def without_small(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a != "--small"]
