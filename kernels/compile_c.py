"""C sources of the kernels: compiled at first use for this very processor, kept in a cache, loaded once a process.

The cache is $XDG_CACHE_HOME/patchbay (~/.cache/patchbay), or a folder of this process alone where that cannot be written. A file there is
named after everything that made it: source, shared headers (kernels/include), compiler, flags, and the processor's instruction sets, since
homes are shared by machines.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

INCLUDE = Path(__file__).with_name("include")  # headers that the sources share
FLAGS = ["-O3", "-std=gnu11", "-fPIC"]
# Not -ffast-math: linked into a shared object it makes the whole process flush small numbers to zero.
ARCHITECTURES: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])  # the first that the compiler takes
# OpenMP's calls are left to be found in the process, where torch has its own runtime: one pool of threads, not two that spin against each
# other. Where torch exports none, the compiler's own runtime is linked; where there is none, one thread works.
THREADING: tuple[tuple[list[str], list[str]], ...] = ((["-fopenmp"], []), (["-fopenmp"], ["-lgomp"]), ([], []))
_lock = threading.Lock()
_loaded: dict[Path, ctypes.CDLL] = {}


def load_library(source: Path) -> ctypes.CDLL:
    """Return the shared library of a C source file, compiled first where the cache lacks it. Threads and processes may call it at once.

    Raises: ImportError when there is no C compiler, or it refuses the source; one line.
    """
    with _lock:
        if source not in _loaded:
            try:
                _loaded[source] = _build(source)
            except OSError as error:
                raise ImportError(f"{source.name} cannot be compiled: {error}") from error
        return _loaded[source]


def compiler() -> list[str]:
    """Words that call the C compiler: $CC (flags and wrappers may be in it), else cc, gcc or clang. Raises ImportError without one."""
    asked = os.environ.get("CC")
    for words in [shlex.split(asked)] if asked else [["cc"], ["gcc"], ["clang"]]:
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise ImportError(f"no C compiler: $CC={asked} is not a program" if asked else "no C compiler: install gcc, or set CC")


def cache_folder() -> Path:
    """The folder of compiled files; made when it is not there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbay"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return Path(tempfile.mkdtemp(prefix="patchbay-"))


def _build(source: Path) -> ctypes.CDLL:
    program, folder, problem = compiler(), cache_folder(), ""
    for architecture in ARCHITECTURES:
        for threads, libraries in THREADING:
            flags = [*FLAGS, *architecture, *threads]
            target = folder / f"{source.stem}-{_fingerprint(source, program, [*flags, *libraries])}.so"
            problem = "" if target.exists() else _compile(program, flags, libraries, source, target)
            if problem:
                continue
            try:
                return ctypes.CDLL(str(target))
            except OSError as error:  # an undefined symbol: this threading runtime is not here
                problem = str(error)
    raise ImportError(f"{shlex.join(program)} cannot build {source.name}: {problem}")


def _compile(program: list[str], flags: list[str], libraries: list[str], source: Path, target: Path) -> str:
    """Compile to a name of this process' own, then rename, so that nobody ever loads half a file. Returns the error, '' for none."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        middle, result = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
        # two steps: with -fopenmp at the link, the compiler's own runtime would be bound
        for step in ([*flags, f"-I{INCLUDE}", "-c", str(source), "-o", middle], ["-shared", middle, "-o", result, *libraries]):
            try:
                done = subprocess.run([*program, *step], capture_output=True, text=True, timeout=120)
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
                return next((line for line in lines if "error" in line), lines[0])
        os.replace(result, target)
    return ""


def _fingerprint(source: Path, program: list[str], flags: list[str]) -> str:
    version = subprocess.run([*program, "--version"], capture_output=True, text=True).stdout
    texts = [file.read_text() for file in (source, *sorted(INCLUDE.glob("*.h")))]
    parts = [*texts, os.path.realpath(program[0]), *program[1:], version, *flags, platform.machine(), _instruction_sets()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
