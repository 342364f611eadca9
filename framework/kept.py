"""`ckpt=EXPORT` of generate.py: the adapters that task.adapter=keep left beside an exported base, one of which `adapter.task` names."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.adapters.base import task_ids
from components.adapters.base.peft_files import CONFIG, ROUTING
from components.contracts import UserError
from framework import build
from framework.export import ADAPTERS, interop, layouts_holding
from framework.foreign import is_foreign
from framework.signatures import nearest

NO_ADAPTER = -1  # `adapter.task` of the base alone


def adapters_beside(ckpt: Any) -> dict[str, Path | None]:
    """{name that `adapter.task` takes: folder of the adapter, None for the base alone}; {} where `ckpt` is no export with adapters.

    The names are those of the folders, and the modes of routing.json.
    """
    base = Path(str(ckpt))
    if ckpt is None or not is_foreign(base):
        return {}
    found: dict[str, Path | None] = {file.parent.name: file.parent for file in sorted(base.glob(f"{ADAPTERS}/*/{CONFIG}"))}
    routing = base / ADAPTERS / ROUTING
    if routing.is_file():
        try:
            modes = json.loads(routing.read_text(encoding="utf-8"))
            found |= {mode: None if place is None else base / ADAPTERS / place for mode, place in modes.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{routing}: damaged ({error}); export it again") from None
    return found


def put_on(run: build.Run, ckpt: Any, beside: Mapping[str, Path | None], task: str | int | None) -> str | None:
    """Put the adapter that `task` names on the run of the base; return its name, None where the base alone is to answer.

    Raises:
        UserError: no adapter of that name, or one that does not fit the base.
    """
    if task is None:
        print(f"ckpt={ckpt}: the base answers alone; the adapters beside it: adapter.task={' | '.join(beside)}", file=sys.stderr)
        return None
    if task == NO_ADAPTER:
        return None
    if task not in beside:
        near = nearest(str(task), beside)
        raise UserError(f"adapter.task: {task!r}; the adapters in {ckpt}/{ADAPTERS} are {', '.join(beside)}{near}")
    name = str(task)
    if (folder := beside[name]) is None:
        return None
    numbers = build.plain(run.cfg.model) | {"vocab_size": run.model.vocab_size}
    layouts = [layout for layout in layouts_holding(numbers["_target_"]).values() if layout is not None]
    interop().put_on(run.model, folder, layouts, numbers)
    run.model.eval()
    holder = task_ids(run.model)
    assert holder is not None
    holder.names = (name,)  # the one task of this adapter, for whoever asks for it by name
    return name
