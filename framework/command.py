"""What the commands `python -m framework.NAME` have in common: parser, exit code of an error, tables of numbers."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from components.contracts import UserError


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of `python -m framework.NAME`, whose help ends in examples."""
    return argparse.ArgumentParser(
        prog=f"python -m framework.{name}", description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None, work: Callable[[argparse.Namespace], int]) -> int:
    """Parse the words and do the work. Returns its exit code, or that of the error, which is reported as train.py does it."""
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    words = parser.parse_args(argv)
    try:
        return work(words)
    except (Exception, KeyboardInterrupt) as error:
        from framework import entry

        return entry.leave_quietly() if isinstance(error, BrokenPipeError) else entry.report(error, words.traceback)


def read_table(path: Path, option: str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV file by the names of its first line; the first row is line 2.

    Args:
        path: of the file.
        option: of the command line that named it.
        columns: that it must have.

    Raises:
        UserError: it cannot be read, lacks a column, has no rows, or one with more cells than columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, names = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{option}: {str(path)!r} cannot be read ({error})") from error
    if missing := [column for column in columns if column not in names]:
        raise UserError(f"{option}: {path} has no column {', '.join(missing)}; its columns are {', '.join(names or ['none'])}")
    if not rows:
        raise UserError(f"{option}: {path} has no rows below the names of its columns")
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise UserError(f"{option}: {path}: line {line} has more cells than the first line names columns")
    return rows
