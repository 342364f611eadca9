"""Shared by the kernel tests: poisoned fresh memory and one thread."""

from __future__ import annotations

import sys

import pytest
import torch


def _poisoned(original):
    def fresh(*args, **kwargs):
        tensor = original(*args, **kwargs)
        if torch.compiler.is_compiling():  # a trace cannot look at frames, and its result is compared with the poisoned one
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("kernels.") and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return fresh


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory that a kernel asks for holds NaN, so that an element nobody writes shows up in the result."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
