"""Compile Triton kernels for NVIDIA targets on a machine without a GPU, with the ptxas that the triton package brings.

Compiling shows that a kernel is legal on the hardware (types, layouts, shared memory, registers), which the interpreter cannot. It shows
neither that the result is right nor how fast it is. The process of the tests interprets kernels (TRITON_INTERPRET=1) and cannot compile:

* `compiled_launches("tests.kernels.test_x")` starts it, calls that module's `launches()` there, and returns what each launch compiled to.
  `launches()` calls the public functions of a triton_kernel.py on small CPU tensors, forwards and backwards; nothing is executed.
* `compile_kernel` compiles one kernel from a signature; only in a process where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90)  # A100; H100 and H200
MAX_SHARED_BYTES = {80: 166912, 90: 232448}  # that one block can have, CUDA C programming guide, table of technical specifications


@dataclass(frozen=True)
class Compiled:
    """What one kernel compiled to. stack_bytes: local memory a thread; above zero it holds spilled registers or an indexed array."""

    kernel: str
    capability: int
    num_warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    capability: int = 90,
    aligned: Sequence[str] = (),
) -> Compiled:
    """Compile the @triton.jit function `fn`.

    Args: signature: type of every argument that is not in `constexprs`, e.g. {"x": "*bf16", "rows": "i32"}. constexprs: values of
    constexpr arguments, and None for a pointer that is left out. aligned: arguments known to be multiples of 16 (pointers: of 16 bytes).
    Raises: what Triton raises when the kernel cannot be compiled; RuntimeError in a process that interprets kernels.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(fn, triton.runtime.JITFunction):
        raise RuntimeError(f"{fn} is not compilable: is TRITON_INTERPRET set? Use compiled_launches, which starts a process without it")
    names = list(fn.arg_names)
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return _describe(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), fn.__name__, capability)


@contextmanager
def recorded_launches(capability: int) -> Iterator[list[Compiled]]:
    """Inside the block every kernel launch compiles its kernel for these very arguments, runs nothing, and joins the yielded list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class NoDevice:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: capability)  # keys the cache of compiled kernels
        get_current_stream = staticmethod(lambda device: 0)

    launched: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(_describe(run(self, *args, grid=grid, warmup=True, **kwargs), self.fn.__name__, capability))

    driver.set_active(NoDevice())
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def compiled_launches(module: str, *, timeout_seconds: float = 300) -> list[Compiled]:
    """Compile what `module`.launches() launches, for every one of CAPABILITIES, in one new process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_support", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return [Compiled(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def _describe(kernel: Any, name: str, capability: int) -> Compiled:
    registers, stack = _usage(kernel.asm["cubin"])
    return Compiled(name, capability, kernel.metadata.num_warps, kernel.metadata.shared, registers, stack)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory that a thread needs, as the binary says."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2])


def _main(module: str) -> None:
    launches = import_module(module).launches
    compiled: list[Compiled] = []
    for capability in CAPABILITIES:
        with recorded_launches(capability) as launched:
            launches()
        compiled += launched
    print(json.dumps([asdict(entry) for entry in compiled]))


if __name__ == "__main__":
    _main(sys.argv[1])
