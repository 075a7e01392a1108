"""The machine a program runs on: device, number format, memory, seeds, versions."""

import ctypes
import importlib.metadata
import os
import platform
import random
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from runtime.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt, from malloc.h
MADV_HUGEPAGE = 14  # Linux, mman.h
HUGE_PAGE = 2**21  # bytes, on x86-64 and most of ARM
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: address space counts as memory


# ------------------------------------------------------------------------------------------------------------
# Seeds, devices, files
# ------------------------------------------------------------------------------------------------------------


DeviceName = Literal["auto", "cuda", "cpu", "mps"]


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of freed tensors; nothing where the C library is another one.

    It gives blocks of 32 MiB and more back to the system at once, and the next layer's map is fetched again,
    page by page: 440,000 page faults a step and a third of its time for 16 slabs on a CPU. What is kept lies
    in huge pages where the system has them.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        ask_for_huge_pages(libc)


def ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the heap that is still to come, half of the machine's memory at most, be of huge pages.

    A map of activations is thousands of pages of 4 KiB, and looking up where each lies takes up to a tenth
    of a training step. The heap grows by a block that is given back to malloc at once: it is address space
    alone until it is used. What calloc hands out of it counts as used, though, and is cleared.
    """
    import resource  # not on Windows

    is_counted = OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() == "2"
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if is_counted or any(limit != resource.RLIM_INFINITY for limit in limits):
        return  # address space is what is short there
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = libc.malloc(size)
    if block:
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(start, block + size - start, MADV_HUGEPAGE)  # refused where there are none: as before
        libc.free(block)


def set_seed(seed: int) -> None:
    """Seed Python, NumPy's global generator (read by libraries alone) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def be_deterministic() -> None:
    """Let torch compute the same bits each time, slower; an operator that cannot raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def choose_device(name: str) -> torch.device:
    """Return the torch device for auto, cuda, cpu or mps; InputError where the one asked for is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[name]:
        raise InputError(
            f"--device {name}", "this machine has none that torch can use", "take --device auto or cpu"
        )
    return torch.device(name)


def amp_dtype(device: torch.device, amp: bool) -> torch.dtype | None:
    """Return the mixed-precision type for a device, or None for float32.

    CUDA: bfloat16 from compute capability 8, float16 below. CPU: bfloat16 where it has the instructions for
    it.
    """
    if not amp or device.type == "mps":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public test for either
    has_bf16 = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if has_bf16 else None


def describe_machine(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the hardware a number was measured on, and the precision of autocast (None: float32)."""
    memory_gb = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    )
    machine = {
        "device": device.type,
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_gb, 1) if memory_gb else None,
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        machine["cpu"] = names[0] if names else machine["cpu"]
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    packages = (
        "torch",
        "torchvision",
        "albumentations",
        "nibabel",
        "numpy",
        "pandas",
        "opencv-python",
        "scipy",
    )
    found = {name: importlib.metadata.version(name) for name in packages if _is_installed(name)}
    return {"python": platform.python_version(), **found}


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GiB so far: allocated by torch on CUDA, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
