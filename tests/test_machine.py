"""Seeds, devices, number formats, memory: what a command asks of its machine."""

import platform
import random
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import machine
from runtime.files import write_json
from runtime.machine import (
    amp_dtype,
    choose_device,
    describe_machine,
    describe_versions,
    peak_memory_gb,
    set_seed,
)

ROOT = Path(__file__).resolve().parents[1]
ExpectInputError = Callable[..., AbstractContextManager[None]]


def draw_from_each() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 3])
def test_a_seed_sets_python_numpy_and_torch(seed: int) -> None:
    set_seed(seed)
    first = draw_from_each()
    draw_from_each()
    set_seed(seed)
    assert draw_from_each() == first
    set_seed(seed + 1)
    assert all(one != other for one, other in zip(draw_from_each(), first, strict=True))


def without_devices(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in present)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in present)


@pytest.mark.parametrize(
    ("present", "chosen"), [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")]
)
def test_auto_takes_the_fastest_device_there_is(
    present: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_devices(monkeypatch, *present)
    assert choose_device("auto").type == chosen
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_missing_is_an_input_error(
    name: str, monkeypatch: pytest.MonkeyPatch, input_error: ExpectInputError
) -> None:
    without_devices(monkeypatch)
    with input_error(f"--device {name}", "cpu"):
        choose_device(name)
    without_devices(monkeypatch, name)
    assert choose_device(name).type == name


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_no_mixed_precision_without_amp(name: str) -> None:
    assert amp_dtype(torch.device(name), amp=False) is None


def test_mixed_precision_type_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp_dtype(torch.device("mps"), amp=True) is None
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None, c=capability: c)
        assert amp_dtype(torch.device("cuda"), amp=True) is dtype


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_cpu_takes_bfloat16_where_it_has_instructions_for_it(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert amp_dtype(torch.device("cpu"), amp=True) is (torch.bfloat16 if avx512 or amx else None)


def test_cpu_does_without_mixed_precision_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert amp_dtype(torch.device("cpu"), amp=True) is None


def test_machine_and_versions_can_stand_in_a_json_file(tmp_path: Path) -> None:
    about = {"hardware": describe_machine(torch.device("cpu")), "versions": describe_versions()}
    write_json(tmp_path / "about.json", about)
    assert about["hardware"]["device"] == "cpu"
    assert about["hardware"]["cpu_cores"] >= 1
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["versions"]["numpy"] == np.__version__


def test_peak_memory_is_in_gib() -> None:
    held = np.ones(2**25)  # 256 MiB, touched
    peak = peak_memory_gb(torch.device("cpu"))
    assert held.nbytes / 2**30 < peak < 64


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_knows_the_unit_of_each_system(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _who: usage)
    assert peak_memory_gb(torch.device("cpu")) == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept_by_every_command():
    code = """
import resource, sys
from dataclasses import dataclass
import numpy as np
from runtime.command import run_command

@dataclass(frozen=True)
class Config:
    pass

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 26, np.uint8)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main(config):
    first = faults()
    print(first, sum(faults() for _ in range(10)))

if sys.argv.pop() == "command":
    run_command(main, Config, "")
else:
    main(None)
"""
    fetched = {}
    for way in ("command", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", code, way], capture_output=True, text=True, check=True, cwd=ROOT
        )
        fetched[way] = [int(value) for value in done.stdout.split()]
    first, later = fetched["command"]
    assert later < first / 10
    assert fetched["plain"][1] > 5 * fetched["plain"][0]  # without it each block is fetched anew


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone")
@pytest.mark.parametrize(("setting", "is_asked"), [("0", True), ("1", True), ("2", False)])
def test_no_address_space_is_taken_where_it_counts_as_memory(
    setting: str, is_asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "OVERCOMMIT", tmp_path / "overcommit_memory")
    machine.OVERCOMMIT.write_text(f"{setting}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    asked: list[int] = []
    libc = types.SimpleNamespace(
        malloc=lambda size: asked.append(size),  # which returns None: there is no memory
        madvise=lambda *_: pytest.fail("nothing was given"),
        free=lambda _: pytest.fail("nothing was given"),
    )
    machine.ask_for_huge_pages(libc)
    assert bool(asked) == is_asked


def has_huge_pages() -> bool:
    """Tell whether a process may ask for huge pages and is told where it has them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if machine.OVERCOMMIT.exists() and machine.OVERCOMMIT.read_text().strip() == "2":
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    return setting.exists() and "[never]" not in setting.read_text() and Path("/proc/self/smaps").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages")
@pytest.mark.parametrize("limited", [False, True])
def test_tensors_lie_in_huge_pages_unless_address_space_is_limited(limited: bool) -> None:
    code = f"""
import resource
import torch
from runtime.machine import keep_freed_memory
if {limited}:
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
keep_freed_memory()
held = torch.ones(2**26)  # 256 MiB
inside = asked = False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        inside = first <= held.data_ptr() + 2**27 < last
    if inside and line.startswith("VmFlags"):
        asked = "hg" in line.split()
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == str(not limited)
