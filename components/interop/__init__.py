"""Checkpoints of other projects. A module of this folder that offers a `LAYOUT` joins by existing."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from components.interop.common import Layout, grow_vocabulary
from components.interop.files import SHARD_BYTES, Source, read

__all__ = ["SHARD_BYTES", "Layout", "Source", "grow_vocabulary", "layouts", "read"]


def layouts() -> dict[str, Layout]:
    """Every layout by its name.

    >>> sorted(layouts())
    ['fla', 'samba', 'transformers']
    """
    modules = (import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [module.LAYOUT for module in modules if isinstance(getattr(module, "LAYOUT", None), Layout)]
    return {layout.name: layout for layout in found}
