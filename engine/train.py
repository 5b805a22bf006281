"""What every rank runs: ``deepspeed --num_gpus 8 --module crossmask.engine.train RECIPE [section.field=value …]``.

``crossmask train`` starts the same module, and so may ``torchrun -m crossmask.engine.train`` or plain
``python -m crossmask.engine.train`` for a single rank.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .beats import beat
from .errors import CheckpointError, UserError, nearest
from .failures import EXIT_STOPPED, FAILURE_FILE, keep_tracebacks_in, report_failure
from .recipe_files import check_world, choose_run_dir, load_recipe, load_run_recipe


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, printed by one rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"train: {message}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for an argument it does not know, with the nearest one it knows."""
    parser = _Parser("crossmask.engine.train", allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run folder; default runs/NAME-DATE-TIME")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; the environment counts")
    found, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        close = nearest(unknown[0].partition("=")[0], options)
        parser.error(f"unknown argument {unknown[0]}; {f'did you mean {close}?' if close else 'see --help'}")
    if found.resume and found.recipe and "=" in found.recipe:
        found.recipe, found.overrides = None, [found.recipe, *found.overrides]
    if found.resume and found.recipe:
        parser.error(f"--resume takes the recipe from {found.resume}; leave {found.recipe} out")
    if found.resume and found.output:
        parser.error(f"--resume goes on in {found.resume}; leave --output out")
    if not found.resume and not found.recipe:
        parser.error("name a recipe, or a run with --resume")
    return found


def train_rank(arguments: Sequence[str] | None = None) -> int:
    """Join the other ranks and train. Returns the loop's exit code on every rank."""
    from .training.display import quiet
    from .training.distributed import from_rank_zero, init_distributed
    from .training.stacks import remove_earlier
    from .training.watchdog import Watchdog

    quiet()
    found = parse_arguments(arguments)
    if found.resume:
        recipe = load_run_recipe(found.resume, found.overrides)
    else:
        recipe = load_recipe(found.recipe, found.overrides)
        if found.output:
            recipe = recipe.model_copy(update={"output": found.output})
        choose_run_dir(recipe)  # refuses a folder in use before DeepSpeed's imports take their seconds
    watchdog = Watchdog(recipe.training.rank_timeout)
    watchdog.start()
    beat("importing DeepSpeed")
    world = init_distributed()
    check_world(recipe, world.size)
    # Every rank must write to one folder, and the default's name holds the time of day.
    chosen = choose_run_dir(recipe) if world.rank == 0 and not found.resume else None
    run_dir = found.resume.absolute() if found.resume else from_rank_zero(chosen)
    if found.resume and not (run_dir / "checkpoints").is_dir():
        raise CheckpointError(f"{found.resume}: no checkpoint to resume from; start the run again")
    watchdog.run_dir = run_dir
    keep_tracebacks_in(run_dir)
    if world.rank == 0:
        remove_earlier(run_dir)
    from .training.loop import pretrain

    code = int(pretrain(recipe, run_dir, resume=bool(found.resume)))
    watchdog.close()
    return code


def main() -> NoReturn:
    from .training.distributed import leave

    try:
        code = train_rank()
    except SystemExit as error:  # --help
        leave(error.code if isinstance(error.code, int) else 1, together=False)
    except KeyboardInterrupt:  # before the loop listens for it: nothing to save yet
        leave(EXIT_STOPPED, together=False)
    except BaseException as error:
        leave(report_failure(error, int(os.environ.get("RANK", "0"))), together=False)
    # DeepSpeed's launcher ends the other ranks when one exits with anything but 0; ours reads status.json instead.
    if code == EXIT_STOPPED and FAILURE_FILE in os.environ:
        code = 0
    leave(code, together=True)


if __name__ == "__main__":
    main()
