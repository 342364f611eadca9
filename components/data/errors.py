"""One-line user errors that every part of `components.data` words alike."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.contracts import UserError


def did_you_mean(value: object, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `options`, or "" when none is near."""
    near = difflib.get_close_matches(str(value), list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choice(key: str, value: object, options: Iterable[str]) -> str:
    """Return `value` when it is one of `options`, else raise UserError naming the key path, the options and the nearest one."""
    options = list(options)
    if value not in options:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(options)}{did_you_mean(value, options)}")
    return str(value)


def at_least(key: str, value: object, smallest: int) -> int:
    """Return `value` when it is a whole number of at least `smallest`, else raise UserError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise UserError(f"{key}: {value!r}; must be a whole number of at least {smallest}")
    return value


def lengths(key: str, value: object) -> list[int]:
    """Return `value` when it is a list of different whole numbers of at least 2, else raise UserError."""
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [None]
    if any(not isinstance(one, int) or isinstance(one, bool) or one < 2 for one in values) or len(set(values)) < len(values):
        raise UserError(f"{key}: {value!r}; must be a list of different whole numbers of at least 2, such as [512, 1024]")
    return values


def fraction(key: str, value: object) -> float:
    """Return `value` when it lies strictly between 0 and 1, else raise UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise UserError(f"{key}: {value!r}; must be between 0 and 1, both excluded (0.05 holds out 5 %)")
    return float(value)


def no_such_file(key: str, path: Path) -> UserError:
    """Make the error for a path that does not exist, with the nearest name beside it."""
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except OSError:
        return UserError(f"{key}: {path}: no such file or folder, and {path.parent} cannot be listed either")
    return UserError(f"{key}: {path}: no such file or folder{did_you_mean(path.name, siblings)}")


def unreadable(path: Path, error: OSError) -> UserError:
    """Turn an operating system error met while reading into one line."""
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def unwritable(folder: Path, error: OSError) -> UserError:
    """Turn an operating system error met while writing the cache into one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{folder}: no space left for the token cache; free some, or choose a cache folder on another disk")
    return UserError(f"{folder}: the token cache cannot be written: {error.strerror or error}; choose another cache folder")
