"""`CommandParser`: argparse whose errors suggest what may have been meant, and whose help fits a terminal."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from ..choices import DTYPES, EMOJI, REVISION
from .argument_types import device_arg

MAX_WIDTH = 100  # columns; longer lines are hard to read
HELP_POSITION = 26  # columns, where the descriptions of options begin


class HelpFormatter(argparse.HelpFormatter):
    """Help as wide as the terminal, up to a limit. Indented lines of descriptions and examples are kept."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
        super().__init__(prog, max_help_position=min(HELP_POSITION, width // 3), width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(line if line.startswith("  ") else textwrap.fill(line, width) for line in lines)

    def _format_action(self, action: argparse.Action) -> str:
        if commands := list(self._iter_indented_subactions(action)):  # without a line for the argument COMMAND
            return "".join(map(self._format_action, commands))
        return super()._format_action(action)

    def _iter_indented_subactions(self, action: Any) -> Any:
        yield from getattr(action, "_get_subactions", list)()  # not indented further


class CommandParser(argparse.ArgumentParser):
    """The parser of `imvar`, or of one command of it."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # whoever reads it knows
        self.given: list[str] = []
        self.commands: dict[str, Any] = {}  # of the parsers of `imvar` and `imvar batch`: the parser of each
        self.noun, self.usual = "command", "vary"  # what they are called, and the one for inputs without one

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore
        self.given = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(self.given, namespace)
        if unknown:  # here rather than by the parser of `imvar`, which cannot say what this command has
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if self.commands and not self.given:
            self.print_help(sys.stderr)
            self.exit(2)
        if self.commands:
            super().error((self.unknown_command() if self.noun.upper() in message else None) or message)
        super().error(self.unknown_option() or message)

    def unknown_option(self) -> str | None:
        """Return a message about the first long option that this command does not have, if there is one."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for text in self.given[: self.given.index("--") if "--" in self.given else None]:
            name = text.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                return f"unknown option {name}; " + self.suggestion(name, known, "did you mean {}?")
        return None

    def unknown_command(self) -> str | None:
        """Return a message about the first argument if it is no command; a photo reads as one for the usual one."""
        first = next((text for text in self.given if not text.startswith("-")), None)
        if first is None or first in self.commands:
            return self.unknown_option()
        if os.path.splitext(first)[1] or os.path.exists(first):
            meant = f"did you mean `{self.prog} {self.usual} {shlex.quote(first)}`?"
            return f"{first} is not {'an' if self.noun == 'action' else 'a'} {self.noun}; {meant}"
        suggestion = self.suggestion(first, list(self.commands), f"did you mean `{self.prog} {{}}`?")
        return f"unknown {self.noun} {first}; {suggestion}"

    def suggestion(self, name: str, known: list[str], question: str) -> str:
        near = get_close_matches(name, known, n=1)
        return question.format(near[0]) if near else f"see {self.prog} --help"


def add_command(
    commands: Any,
    name: str,
    *,
    prog: str = "imvar",
    arguments: str = "[options]",
    example: str,
    epilog: str = "",
    **texts: str,
) -> CommandParser:
    """Add a command, which `run(args)` of the module `imvar/cli/NAME.py` runs; the module is imported then."""
    texts |= {"usage": f"{prog} {name} {arguments}", "epilog": f"Example:\n  {example}\n\n{epilog}".rstrip()}
    command = commands.add_parser(name, **texts)
    command.set_defaults(usage_error=command.error)
    return command


def add_model_options(command: CommandParser, default: str, is_brief: bool = False) -> Callable[..., Any]:
    """Add the options that select a checkpoint and where it runs; return what adds to the group of them."""
    add = command.add_argument_group("checkpoint and hardware").add_argument
    checkpoint = f"a hub id, folder or file, or {EMOJI} (default: {default})"
    add("--checkpoint", default=default, metavar="ID|PATH", help=checkpoint)
    add("--revision", metavar="R", help=f"of a hub id: branch, tag or commit (the default's: {REVISION})")
    add(
        "--device",
        type=device_arg,
        default="auto",
        metavar="D",
        help="cpu, cuda, cuda:1, mps (default: auto, the fastest)",
    )
    auto = "the fastest" if is_brief else f"half precision where it is fast; float32 with {EMOJI}"
    dtypes = f"{', '.join(DTYPES)} (default: auto, {auto})"
    add("--dtype", choices=("auto", *DTYPES), default="auto", metavar="TYPE", help=dtypes)
    return add
