"""Which implementation of an op runs: the fastest that the op's folder offers for the device, unless one is forced.

A backend is a module of the op's folder with the op's public functions under their own names. It joins by existing:
`triton_kernel.py` serves CUDA, `cpu.py` the CPU, `eager.py` and `reference.py` every device.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

_log = logging.getLogger(__name__)

MODULES = {"triton": "triton_kernel", "cpu": "cpu", "eager": "eager", "reference": "reference"}
ORDER = {"cuda": ("triton", "eager"), "cpu": ("cpu", "eager")}  # fastest first; other devices get eager
_forced: dict[str | None, str] = {}  # op, or None for all ops, -> backend; a plain dict, since a ContextVar breaks full-graph compile
_picked: dict[tuple[str, str, str], ModuleType] = {}


def pick(op: str, device: torch.device | str, backend: str = "auto") -> ModuleType:
    """Return the backend module of `op` for tensors on `device`.

    Args: op: folder name under `kernels`. backend: a key of MODULES, or "auto" for the forced one, else the fastest that can be loaded.
    The choice is logged once an op and device. A device that misses a faster backend which the folder has gets a warning.
    Raises: ValueError for an unknown backend, or one that `op` does not offer. ImportError when a named backend cannot be loaded.

    >>> pick("rms_norm", "cpu", "eager").__name__
    'kernels.rms_norm.eager'
    """
    kind = torch.device(device).type if isinstance(device, str) else device.type
    if backend == "auto" and _forced:
        backend = _forced.get(op) or _forced.get(None) or "auto"
    found = _picked.get((op, kind, backend))
    if found is None:
        found = _picked[(op, kind, backend)] = _load(op, kind, backend)
    return found


@contextmanager
def force(backend: str, op: str | None = None) -> Iterator[None]:
    """Make `pick` choose `backend` inside the block, for one op or for all of them. Not per thread.

    >>> with force("reference"):
    ...     pick("rms_norm", "cpu").__name__
    'kernels.rms_norm.reference'
    """
    _check_name(backend)
    before = _forced.get(op)
    _forced[op] = backend
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def available(op: str) -> list[str]:
    """Backends whose file exists in the folder of `op` (they may still fail to load, e.g. without triton)."""
    return [name for name, module in MODULES.items() if find_spec(f"kernels.{op}.{module}") is not None]


def _check_name(backend: str) -> None:
    if backend not in MODULES:
        raise ValueError(f"backend: {backend!r}; allowed are auto, {', '.join(MODULES)}")


def _load(op: str, kind: str, backend: str) -> ModuleType:
    offered = available(op)
    if backend != "auto":
        _check_name(backend)
        if backend not in offered:
            raise ValueError(f"kernels.{op} has no backend {backend!r}; it offers {', '.join(offered)}")
        return import_module(f"kernels.{op}.{MODULES[backend]}")
    for name in ORDER.get(kind, ("eager",)):
        if name not in offered:
            continue
        try:
            module = import_module(f"kernels.{op}.{MODULES[name]}")
        except ImportError as error:
            line = f"kernels.{op} on {kind}: backend {name} cannot be loaded ({error}); a slower one runs"
            warnings.warn_explicit(line, UserWarning, "patchbay", 0)  # no source line of ours after it
            continue
        _log.info("kernels.%s on %s: %s", op, kind, name)
        return module
    raise ValueError(f"kernels.{op} has no backend for device {kind}; it offers {', '.join(offered)}")
