"""The ``crossmask`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .failures import EXIT_USER_ERROR, handle_user_errors, print_error

app = typer.Typer(
    name="crossmask",
    help="Pre-train vision-language models under masks taken from cross-attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"crossmask {version('crossmask')}")
        except PackageNotFoundError:
            typer.echo("crossmask (not installed)")
        raise typer.Exit


@app.callback()
def crossmask(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


# typer reads these annotations at run time; Optional and not "| None" for Python 3.10's sake.
@app.command(short_help="Train a recipe on every GPU, or on CPU ranks where there is none.")
def train(
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A recipe file, or the name of a shipped recipe (see: crossmask recipes)."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change, such as training.max_steps=20 model.fusion.depth=4."),
    ] = None,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN", help="Continue the run in this folder, with its own recipe."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The run folder. Default: runs/NAME-DATE-TIME."),
    ] = None,
    ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes to start. Default: every GPU, else training.cpu_ranks."),
    ] = None,
) -> int:
    """Train a recipe. Ctrl-C saves a checkpoint and stops; --resume goes on from it."""
    from .deepspeed_config import build_deepspeed_config
    from .recipe_files import choose_run_dir, load_recipe, load_run_recipe
    from .train import parse_arguments
    from .training.launcher import launch, plan_ranks

    given = [*([recipe] if recipe else []), *(overrides or [])]
    options = [*(["--resume", str(resume)] if resume else []), *(["--output", str(output)] if output else [])]
    parse_arguments([*given, *options])  # the same rules as inside the ranks
    if resume:
        run_dir = resume.absolute()
        described = load_run_recipe(run_dir, given)
    else:
        described = load_recipe(given[0], given[1:])
        if output:
            described = described.model_copy(update={"output": output})
        run_dir = choose_run_dir(described)
        options = ["--output", str(run_dir)]
    plan = plan_ranks(described, ranks)
    build_deepspeed_config(described, plan.ranks, plan.device_type)
    return launch([*given, *options], run_dir, plan, rank_timeout=described.training.rank_timeout)


@app.command()
def reshard(run: Annotated[Path, typer.Argument(help="A run folder. The run must stand still meanwhile.")]) -> None:
    """Make a run's latest checkpoint load into any number of ranks."""
    from .training.reshard import reshard as convert

    typer.echo(f"{convert(run, typer.echo)} is the latest; continue with: crossmask train --resume {run} --ranks N")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.")],
    teacher: Annotated[bool, typer.Option("--teacher/--student", help="Which of the two.")] = True,
    step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="The checkpoint of this step. Default: the latest good one."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="Of the weights.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    plugin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="MODULE", help="Import it: it registers the run's model.system."),
    ] = None,
) -> None:
    """Write a run's model as a folder that loads without DeepSpeed: safetensors, config, tokenizer, example."""
    from .export import export_run

    typer.echo(export_run(run, to, "teacher" if teacher else "student", step, dtype, force, typer.echo, plugin or ()))


convert = typer.Typer(help="Translate checkpoints of other code, and back.", no_args_is_help=True)
app.add_typer(convert, name="convert")


@convert.command()
def albef(
    source: Annotated[Path, typer.Argument(metavar="IN", help="ALBEF's .pth, or a folder of ours, such as a run.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, or the .pth.")],
    vocabulary: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="The vocab.txt of its words; bert-base-uncased's for the published ones."),
    ] = None,
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="PIXELS", help="Resize the position embeddings for images of this size."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
) -> None:
    """Make a folder of an official ALBEF checkpoint, or a checkpoint of a folder, without loss."""
    from .convert import convert_albef

    typer.echo(convert_albef(source, target, vocabulary, image_size, force, typer.echo))


@convert.command("open-clip")
def open_clip(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A state dict (.pt, .safetensors), or a folder of ours, such as a run.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, or the .pt or .safetensors.")],
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Its configuration (.json), where heads are not those of open_clip's CoCas."),
    ] = None,
    vocabulary: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz, which open_clip_torch has."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
) -> None:
    """Make a folder of a CoCa of open_clip, or a state dict of a folder, without loss."""
    from .convert_open_clip import convert_open_clip

    typer.echo(convert_open_clip(source, target, config, vocabulary, force, typer.echo))


@app.command()
def caption(
    model: Annotated[Path, typer.Argument(help="A run folder, or a folder of crossmask export or crossmask convert.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures.")],
    beams: Annotated[int, typer.Option(min=1, help="Beginnings that the search keeps, 64 at most; 1 = greedy.")] = 3,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="P", help="Draw each token from the likeliest that have this probability together."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of --top-p.")] = 1.0,
    max_tokens: Annotated[Optional[int], typer.Option(min=2, help="The longest, at most the model's.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, help="Of --top-p.")] = 0,
    teacher: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--teacher/--student", help="Which of the two, where there are both."),
    ] = None,
) -> None:
    """Write captions for pictures, one a line: the picture, its caption, and log-probability a token."""
    from .training.display import quiet

    quiet()  # before the libraries that it quiets are imported
    from .caption_images import caption_images

    options = {"beams": beams, "top_p": top_p, "temperature": temperature, "max_tokens": max_tokens}
    chosen = None if teacher is None else "teacher" if teacher else "student"

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    for path, text, value in caption_images(model, images, options, seed, chosen, tell):  # type: ignore[arg-type]
        typer.echo(os.fsencode(f"{path}\t{text}\t{value:.3f}"))  # bytes: a file's name need not be UTF-8


@app.command(short_help="Measure a trained model's retrieval on a recipe's pairs.")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, or a folder of crossmask export or crossmask convert.")],
    recipe: Annotated[str, typer.Argument(help="A recipe: its data and its evaluation section are used.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change, such as data.path=PAIRS.json evaluation.rerank=256."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also write all figures there, as JSON."),
    ] = None,
    teacher: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--teacher/--student", help="Which of the two, where there are both."),
    ] = None,
) -> None:
    """Measure image–text retrieval: full galleries, re-ranked by ITM, and sampled ones.

    The model brings its image size, normalisation and vocabulary; the recipe says on which pairs and how. Of a file
    with splits val and test are evaluated, of any other all pairs.
    """
    from .training.display import quiet

    quiet()  # before the libraries that it quiets are imported
    from .model_evaluation import evaluate_model

    chosen = None if teacher is None else "teacher" if teacher else "student"
    evaluate_model(model, recipe, overrides or [], output, chosen)  # type: ignore[arg-type]


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for a bug report.")] = False,
) -> int:
    """Say what this machine can run, what is missing for the rest, and what to do about it."""
    from .doctor import run_doctor

    return run_doctor(as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    pictures: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Also write curves.png, retrieval.png and masks.png there."),
    ] = None,
) -> None:
    """Rebuild a run's report.html and print where it is."""
    from .evaluation.report import build_report, save_pictures

    typer.echo(build_report(run))
    for picture in save_pictures(run, pictures) if pictures else []:
        typer.echo(picture)


data = typer.Typer(help="Look at the data of a recipe.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def masks(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the folder of a finished run: its teacher then looks.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change, such as masking.policy=random masking.image_ratio=0.75."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path("masks.png"),
    pairs: Annotated[int, typer.Option(min=1, max=64, help="How many pairs to draw.")] = 6,
    step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="The step of the run to draw, for policies that change. Default: the last."),
    ] = None,
) -> None:
    """Draw which patches and words a recipe's policy hides, on pairs of its own data."""
    from .mask_preview import preview

    for line in preview(recipe, overrides or [], output, pairs, step):
        typer.echo(line)


@data.command()
def check(
    source: Annotated[
        str, typer.Argument(help="What data.path takes: a file of pairs, a folder, shards; or a recipe.")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change, such as data.image_root=DIR data.validation_path=FILE."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path("check.png"),
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also write every finding there."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, max=140, help="How many pairs the picture shows.")] = 14,
) -> int:
    """Read all of a set of pairs, decode every image, and say what is wrong with which, and what is odd.

    Exit code 0: no defects; 1: there are some; 2: it cannot be opened at all; 130: stopped, with what was found so far.
    """
    from .training.display import quiet

    quiet()  # before the libraries that it quiets are imported
    from .data_check import check_data

    code, lines = check_data(source, overrides or [], output, json, pairs)
    for line in lines:
        typer.echo(line)
    return code


@app.command(short_help="Train variants of a recipe over seeds, and write a table of what each reached.")
def ablate(
    ablation: Annotated[
        str, typer.Argument(help="An ablation's file, or the name of a shipped one (see: crossmask recipes).")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change in every variant, such as training.max_steps=20."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder of the runs and the table. Default: runs/ablation-NAME."),
    ] = None,
    seeds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="0,1,2", help="Default: the ablation's."),
    ] = None,
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="Train these variants alone."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Write the table of what is finished; train nothing.")
    ] = False,
) -> int:
    """Train the variants of an ablation one after another; ablation.md, .csv and .png tell what each reached.

    Ctrl-C stops; the same command goes on: finished runs are kept, a half-finished one is resumed.
    """
    from .ablation import ablate as run

    def tell(line: str) -> None:
        typer.echo(line)
        sys.stdout.flush()  # the ranks write to the same place

    return run(ablation, overrides or [], output, seeds, only, tell, dry_run=dry_run, table_only=table_only)


@app.command(short_help="Predict memory, traffic and time of a recipe on GPUs that need not be there.")
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Fields to change, such as training.batch_size=4096."),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs that train together.")] = 8,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Which; an unknown name lists the known ones.")] = "h100",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Also write all figures there."),
    ] = None,
    efficiency: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SHARE", help="Of the peak rate that matrix products reach. Default: 0.6."),
    ] = None,
) -> None:
    """Predict what a recipe needs: memory by ZeRO stage, bytes on the wire, a step's time, the batch that fits.

    Nothing is trained and no data are opened; docs/scaling.md says what is counted, and what two real ranks showed.
    """
    from .planning.command import plan_recipe

    plan_recipe(recipe, overrides or [], gpus, gpu, output, efficiency)


@app.command()
def recipes() -> None:
    """List the recipes and the ablations that come with the package."""
    from rich.console import Console
    from rich.table import Table

    from .ablation import load_ablation, shipped_ablations
    from .recipe_files import SHIPPED, read_yaml, shipped_recipes

    notes = {  # a recipe for the user's own data is none yet without them, but its note can be read
        "recipe": [
            (name, str(read_yaml(SHIPPED / f"{name}.yaml", name).get("note", ""))) for name in shipped_recipes()
        ],
        "ablation": [(name, load_ablation(name).title) for name in shipped_ablations()],
    }
    for kind, named in notes.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(kind, no_wrap=True)
        table.add_column("what it is")
        for name, note in named:
            table.add_row(name, note)
        Console().print(table)


def main() -> None:
    """Entry point: exit code 0 done, 2 a user's mistake in one line, 130 stopped, 1 anything else."""
    with handle_user_errors():
        try:
            result: Any = app(standalone_mode=False)
        except typer.Abort:
            sys.exit(130)
        except Exception as error:
            # A usage error of click, which typer imports or carries along under changing names.
            tell = getattr(error, "format_message", None)
            if tell is None:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                print_error(f"crossmask: {tell().rstrip('.')}; see crossmask --help")
            sys.exit(EXIT_USER_ERROR)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
