"""`imvar --print-completion SHELL`: a script that completes commands, options, choices and file names, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = "bash", "zsh", "tcsh"
FILES = {"PHOTO", "PHOTOS", "MORE", "PHOTO=WEIGHT", "A", "B", "FILE", "ID|PATH", "SOURCE", "TARGET", "CHECKPOINT"}
FOLDERS = {"FOLDER", "OUT"}  # these are metavars


class PrintCompletion(argparse.Action):
    """Print the script for a shell, and end the program."""

    def __call__(self, parser: Any, namespace: Any, shell: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            return parser.error(
                "--print-completion: expected the package shtab, got none; pip install 'imvar[completion]'"
            )
        for action in all_arguments(parser):
            if action.metavar in FILES:
                action.complete = shtab.FILE
            elif action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def all_arguments(parser: Any) -> Iterator[Any]:
    """Yield the arguments of a parser and of its commands."""
    yield from parser._actions
    for command in parser.commands.values():
        yield from all_arguments(command)
