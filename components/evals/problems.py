"""Files of problems, as evaluations read them: a row a problem, with the fields that are needed, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from components.contracts import UserError
from components.data.errors import did_you_mean
from components.data.readers import expand, read_records


class Problem(NamedTuple):
    """fields: text by name; where: file and line, for messages."""

    fields: dict[str, str]
    where: str


def read_problems(key: str, path: str | None, forms: Sequence[Sequence[str]], most: int | None = None) -> list[Problem]:
    """The first `most` rows of .jsonl(.gz), .json or .parquet, a folder of them or a glob; a row has all the fields of one form.

    A row in a later form gets the names of the first. Raises UserError, naming `key`, for no path, no rows, and a row that lacks a field.
    """
    if path is None:
        raise UserError(f"{key}: null; give a file of problems: {key}=FILE.jsonl with {' and '.join(forms[0])} in each line")
    found: list[Problem] = []
    for _, file in expand(key, path):
        for place, record in read_records(file):
            if isinstance(record, str):
                raise UserError(f"{key}: {file} is plain text; give .jsonl with {' and '.join(forms[0])} in each line")
            found.append(Problem(_fields(record, forms, f"{file}, {place}"), f"{file}, {place}"))
            if len(found) == most:
                return found
    if not found:
        raise UserError(f"{key}: {path}: no row in it; give a line with {' and '.join(forms[0])} for each problem")
    return found


def _fields(record: dict[str, Any], forms: Sequence[Sequence[str]], where: str) -> dict[str, str]:
    form = next((form for form in forms if all(name in record for name in form)), None)
    if form is None:
        missing = next(name for name in forms[0] if name not in record)
        known = ", ".join(map(str, record)) or "no field"
        raise UserError(f"{where} has only {known}; it needs {', '.join(forms[0])}{did_you_mean(missing, map(str, record))}")
    for name in form:
        if not isinstance(record[name], str):
            raise UserError(f"{where}: {name} holds {type(record[name]).__name__}, not text")
    return {first: record[name] for first, name in zip(forms[0], form, strict=True)}
