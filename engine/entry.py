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
from duotone.data.whole_file import told_by_the_disk
from duotone.engine import checkpoint
from duotone.engine.command_line import parse
from duotone.engine.log import say, say_warnings_plainly
from duotone.engine.recipe import Recipe

ONLY_THIS_RANK = 10
"""Seconds after which a rank that refuses is known to be the only one: the launcher would have ended it."""


def main(recipe: Recipe, embedded: Recipe | None = None) -> None:
    """Runs a recipe file: overrides from the command line, then training; refused input is one line and exit code 2.

    `embedded` is the small network for the embedded data set: it is taken where neither the recipe nor --data.shards names
    data, and, for data of one's own, with --small.
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
        tell(refusal)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        # The launcher sends it after Ctrl-C, and the last line comes first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell_where(recipe)
        sys.exit(getattr(interrupt, "code", 130))
    except (OSError, SafetensorError) as error:
        line = told_by_the_disk(error)
        if line is None:
            raise
        tell(Refused(line))
        sys.exit(2)
    except RuntimeError as error:
        from duotone.engine.distributed.zero import lost_a_rank

        if lost_a_rank(error):
            # The launcher ends this rank for the other's fault, which alone is worth telling.
            time.sleep(2 * ONLY_THIS_RANK)
            tell_of_the_other(error)
        raise


def tell_where(recipe: Recipe) -> None:
    """Where an interrupted run goes on from."""
    if int(os.environ.get("RANK", 0)) == 0:
        found = checkpoint.known(recipe.folder / "checkpoints")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)  # by its name a damaged one may be
        where = f"{recipe.again} goes on from {newest}" if newest else "there is no checkpoint to go on from yet"
        with contextlib.suppress(OSError):  # where nobody listens any more
            print(f"\nduotone: interrupted: {where}", file=sys.stderr, flush=True)


def tell(refusal: Refused) -> None:
    """One line from all ranks together: rank 0 speaks, and where the launcher then ends the others they say nothing."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(ONLY_THIS_RANK)
    where = f" on rank {rank} ({socket.gethostname()})" if rank else ""
    print(f"duotone: refused{where}: {refusal}", file=sys.stderr, flush=True)


def tell_of_the_other(error: RuntimeError) -> None:
    """On another machine than the rank that has ended; where the library has more to say, it is left to say it."""
    if not isinstance(error, DistError):
        rank, host = os.environ.get("RANK", 0), socket.gethostname()
        said = re.search(r"Connection \w+ by peer( \[[^]]+\])?|Broken pipe", str(error))[0]
        why = f"another rank has ended, whose own words tell why ({said})"
        print(f"duotone: rank {rank} ({host}) stops: {why}", file=sys.stderr, flush=True)
        sys.exit(1)


def base_of(recipe: Recipe, embedded: Recipe | None, arguments: list[str]) -> Recipe:
    """The recipe that the command line's overrides are laid over."""
    small = "--small" in arguments
    if embedded is None and small:
        raise Refused(f"--small: {recipe.name} has no small network of its own")
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
            say("neither data.shards nor --data.shards: training on the embedded captioned shapes")
        return recipe
    say(
        f"no --data.shards: training a small network on the embedded captioned shapes. The full {recipe.name} recipe: "
        "duotone prepare --help, then --data.shards DIR (with --small for the small network on your data)"
    )
    return embedded


def without_small(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a != "--small"]
