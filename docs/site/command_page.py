"""Every command with its arguments and options, from the parser that reads them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from recipe_page import escaped

from crossmask.engine.cli import app

HEAD = """# Commands

`crossmask` is one command with subcommands; `crossmask COMMAND --help` says on the terminal what is said here. A user's
mistake is one line on standard error that names the culprit and the remedy.

| exit code | |
|---|---|
| 0 | done |
| 2 | a mistake in what was given: an unknown field, a file that is not there |
| 130 | stopped by Ctrl-C |
| 1 | anything else |

Inside a launcher of yours, `deepspeed --module crossmask.engine.train` and `torchrun -m crossmask.engine.train` take
what `crossmask train` takes, but `--ranks`.
"""


def page() -> str:
    lines = [HEAD]
    found = list(commands())
    lines += ["| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {summary(command)} |" for name, command in found]
    for name, command in found:
        lines += described(name, command)
    return "\n".join(lines) + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Full name and click's command, of everything that can be run."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for inner, child in command.commands.items():
                yield from below(f"{name} {inner}", child)
        else:
            yield name, command

    yield from below("crossmask", typer.main.get_command(app))


def summary(command: Any) -> str:
    return escaped(command.short_help or paragraphs(command)[0])


def paragraphs(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]


def usage(name: str, command: Any) -> str:
    parts = [name, *(["[OPTIONS]"] if any(p.param_type_name == "option" for p in command.params) else [])]
    for each in command.params:
        if each.param_type_name == "argument":
            shown = (each.metavar or each.name.upper()) + ("…" if each.nargs == -1 and not each.metavar else "")
            parts += [shown if each.required else f"[{shown}]"]
    return " ".join(parts)


def described(name: str, command: Any) -> list[str]:
    lines = ["", f"## `{name}` {{ #{name.replace(' ', '-')} }}", ""]
    lines += [f"{escaped(text)}\n" for text in paragraphs(command)]
    lines += ["```text", usage(name, command), "```", ""]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{each.metavar or each.name.upper()}` | {escaped(each.help or '')} |" for each in arguments] + [
            ""
        ]
    if options:
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [f"| {names(each)} | {default_of(each)} | {escaped(each.help or '')} |" for each in options]
    return lines


def names(option: Any) -> str:
    given = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or ('N' if is_number(option) else 'VALUE')}"
    return f"`{escaped(given + value)}`"


def is_number(option: Any) -> bool:
    """Of typer 0.29 an option knows its annotation, of earlier ones a type of click's."""
    known = getattr(option, "type_descriptor", None)
    name = getattr(known.annotation if known else option.type, "__name__", "") or getattr(option, "type", "")
    return str(name).lower().startswith(("int", "float"))


def default_of(option: Any) -> str:
    if option.required:
        return "*required*"
    if option.is_flag and option.secondary_opts:
        value = {True: option.opts[0], False: option.secondary_opts[0]}.get(option.default)
        return f"`{value}`" if value else ""
    return "" if option.default in (None, False) else f"`{escaped(str(option.default))}`"
