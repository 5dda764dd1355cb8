"""Compile and load the device guard (cuda_guard.cpp) that CPU builds of PyTorch lack. Does not import torch."""
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def load() -> None:
    """Must be called before torch is imported. Compiles once for each build of PyTorch."""
    assert "torch" not in sys.modules, "the device guard must be loaded before torch"
    torch_directory = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    include, libraries = torch_directory / "include", torch_directory / "lib"
    key = hashlib.sha256(SOURCE.read_bytes() + (torch_directory / "version.py").read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"cuda_guard-{os.getuid()}-{key}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include",
                        str(SOURCE), "-o", str(temporary), f"-L{libraries}", "-lc10", "-ltorch_cpu",
                        f"-Wl,-rpath,{libraries}"], check=True)
        temporary.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
