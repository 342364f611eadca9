"""Ops of the project: one folder an op, with a specification (`reference.py`) and fast torch (`eager.py`); others join by existing.

A folder's `__init__` holds the public function: it checks shapes and hands over to the backend that `kernels.dispatch` picks.
Imports torch only; triton and compilers are reached lazily from the backend files.
"""
