"""Ops of the project: one folder an op, each with a specification (`reference.py`), fast torch (`eager.py`) and, where it pays, a compiled backend.

A folder's `__init__` holds the public function: it checks shapes and hands over to the backend that `kernels.dispatch` picks. Imports torch only;
triton and compilers are reached lazily from the backend files.
"""
