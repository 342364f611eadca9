"""Checkpoints of other projects. A module of this folder that offers a `LAYOUT` joins by existing."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from components.interop.adapters import adapter_usage, kept_adapters, load_renamed, module_names, put_on, read_back, write_adapters
from components.interop.common import Layout, grow_vocabulary
from components.interop.companions import data_option, named_end, prompt_template, write_companions
from components.interop.files import CONFIG, SHARD_BYTES, Source, read

__all__ = [
    "CONFIG", "SHARD_BYTES", "Layout", "Source", "adapter_usage", "data_option", "grow_vocabulary", "kept_adapters", "layouts",
    "load_renamed", "module_names", "named_end", "prompt_template", "put_on", "read", "read_back", "write_adapters", "write_companions",
]  # fmt: skip


def layouts() -> dict[str, Layout]:
    """Every layout by its name.

    >>> sorted(layouts())
    ['fla', 'phi3', 'samba', 'transformers']
    """
    modules = (import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [module.LAYOUT for module in modules if isinstance(getattr(module, "LAYOUT", None), Layout)]
    return {layout.name: layout for layout in found}
