"""A plan as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .estimate import RESERVED, Plan, Stage, kinds

GB = 1e9


def show(found: Plan, console: Console) -> None:
    """Memory by stage, then traffic and time at the stage that the recipe asks for."""
    own = found.stages[found.own]
    recommended = found.recommended
    training = found.recipe.training
    micro = training.accumulation_steps
    nodes = -(-found.gpus // found.device.gpus_per_node)
    console.print(
        f"[bold]{found.recipe.name}[/bold] on {found.gpus} × {found.device.title}, {nodes} node{'s' * (nodes > 1)}:"
        f" batch {training.batch_size:,} = {found.pairs} a GPU × {found.gpus}" + (f" × {micro}" if micro > 1 else "")
    )
    console.print(
        f"{found.parameters:,} parameters, {found.teacher:,} of them with a teacher;"
        f" {training.precision}. [bold]Predicted[/bold], nothing is measured."
    )
    console.print()
    console.print(_memory(found))
    console.print()
    console.print(_wire(own))
    console.print()
    console.print(_time(found, own))
    console.print()
    console.print(_stages(found))
    console.print()
    if recommended is not None:
        console.print(
            f"[bold]recommended: ZeRO stage {recommended.stage}[/bold]"
            + (f" (the recipe takes {own.stage})" if recommended.stage != own.stage else ", as the recipe takes")
        )
    rates = found.rates
    console.print(
        f"Assumed: matrix products reach {rates.matrix:.0%} of the peak (--efficiency), memory {rates.memory:.0%},"
        f" links {rates.network:.0%}, no launch is below {rates.launch * 1e6:g} µs; reading pictures costs nothing;"
        f" {RESERVED:.0%} of the memory are CUDA's."
    )
    for note in found.notes:
        console.print(f"Assumed: {note}.")
    console.print(f"Rates of {found.device.name}: {found.device.source}.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory(found: Plan) -> Table:
    table = _table("memory a GPU, GB", "", *(f"ZeRO {stage.stage}" for stage in found.stages))
    for name in kinds(found.stages):
        table.add_row(name, *(f"{stage.memory[name] / GB:.2f}" for stage in found.stages))
    table.add_row("total", *(f"{stage.total / GB:.2f}" for stage in found.stages), style="bold")
    left = [(found.usable - stage.total) / GB for stage in found.stages]
    table.add_row(f"left of {found.usable / GB:.1f}", *(f"{x:.2f}" if x >= 0 else f"[red]{x:.2f}[/red]" for x in left))
    table.add_row("pairs a GPU that fit", *(f"{stage.pairs:,}" for stage in found.stages))
    return table


def _wire(stage: Stage) -> Table:
    columns = ("", "operation", "MB given", "in node", "between", "ms", "waits")
    table = _table(f"sent by each GPU in a step, MB, at ZeRO {stage.stage}", *columns)
    for one in stage.transfers:
        table.add_row(
            one.collective.kind,
            one.collective.operation,
            *(f"{count / 1e6:,.1f}" for count in (one.collective.count, one.inside, one.between)),
            f"{one.seconds * 1e3:.2f}",
            f"{one.exposed * 1e3:.2f}",
        )
    if not stage.transfers:
        table.add_row("nothing: one GPU")
    return table


def _time(found: Plan, stage: Stage) -> Table:
    table = _table(f"a step at ZeRO {stage.stage}, predicted", "", "ms", "share")
    for name, seconds in stage.parts.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / stage.seconds:.0%}")
    peak = found.device.matrix[found.recipe.training.precision]
    used = found.flops / stage.seconds / peak
    table.add_row("step", f"{stage.seconds * 1e3:.2f}", f"{used:.0%} of peak", style="bold")
    return table


def _stages(found: Plan) -> Table:
    training = found.recipe.training
    table = _table("by stage", "", "step, ms", "samples/s a GPU", "samples/s", "the recipe")
    for stage in found.stages:
        rate = training.batch_size / stage.seconds
        table.add_row(
            f"ZeRO {stage.stage}{'' if found.fits(stage) else ', does not fit'}",
            f"{stage.seconds * 1e3:.1f}",
            f"{rate / found.gpus:,.0f}",
            f"{rate:,.0f}",
            duration(training.max_steps * stage.seconds),
        )
    return table


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
