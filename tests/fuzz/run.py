"""Damage files and see what the readers say: counts, times and memory per target."""

import contextlib
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import InputError
from tests.fuzz.targets import SEEDS, TARGETS, Target, damage

LONGEST_S = 5.0  # of processor time, as others may use the machine too
MOST_BYTES = 1 << 30
IS_LINUX = sys.platform == "linux"  # elsewhere memory is not measured


@dataclass
class Report:
    """What became of the damaged files of one target."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    errors: list[tuple[str, bytes]] = field(default_factory=list)  # broken promises, with the file
    longest_s: float = 0.0
    peak_bytes: int = 0  # above what the process held before the first file

    @property
    def sentence(self) -> str:
        """The figures on one line."""
        kinds = Counter(problem.split(":")[0] for problem, _ in self.errors)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        return (
            f"{self.tried:>7} tried {self.refused:>7} refused {self.accepted:>7} accepted "
            f"{len(self.errors):>5} other  longest {self.longest_s:.2f} s  "
            f"peak {self.peak_bytes / 2**20:.0f} MiB  {shown}"
        )


class TooLongError(BaseException):
    """A reader took more processor time than LONGEST_S; no reader catches it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let no reader take more memory or time than promised: MemoryError, TooLongError."""

    def stop(*_: object) -> None:
        raise TooLongError

    if not IS_LINUX:
        yield
        return
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * MOST_BYTES, before[1]))  # address space, not all used
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def resident_bytes(name: str) -> int:
    """Return VmRSS or VmHWM of this process, 0 where they are not known."""
    if not IS_LINUX:
        return 0
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def try_file(target: Target, path: Path, expected: object, report: Report, must_be_whole: bool) -> None:
    """Read a damaged file and add to the report what came of it."""
    content = path.read_bytes()
    report.tried += 1
    held = resident_bytes("VmRSS")
    if IS_LINUX:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    started = time.process_time()
    problem = None
    try:
        signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
        read = target.read(path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        report.accepted += 1
        if must_be_whole and read is not None and read != expected:
            problem = "changed content was believed"
    except InputError as error:
        report.refused += 1
        if "\n" in str(error) or not str(error).strip():
            problem = "not one sentence"
    except TooLongError:
        problem = "too long"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    report.longest_s = max(report.longest_s, time.process_time() - started)
    used = resident_bytes("VmHWM") - held
    report.peak_bytes = max(report.peak_bytes, used)
    if used > MOST_BYTES:
        problem = "too much memory"
    if problem:
        report.errors.append((problem, content))


def fuzz(name: str, count: int, seed: int, folder: Path) -> Report:
    """Damage the target's files `count` times, after the files kept in seeds/NAME, and report."""
    target, report = TARGETS[name], Report()
    path = folder / target.name
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    expected = {}
    for whole in seeds:
        path.write_bytes(whole)
        expected[whole] = target.read(path)
    kept = sorted((SEEDS / name).glob("*"))
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in kept:
            path.write_bytes(file.read_bytes())
            try_file(target, path, None, report, must_be_whole=False)
        for index in range(count):
            whole, damaged, must_be_whole = damage(target, seeds, random.Random(f"{seed} {index}"))
            path.write_bytes(damaged)
            try_file(target, path, expected[whole], report, must_be_whole)
    return report


def keep(name: str, report: Report, most: int = 5) -> None:
    """Keep the first files of each kind of error in seeds/NAME."""
    kinds: dict[str, list[bytes]] = {}
    for problem, content in report.errors:
        kinds.setdefault(problem.split(":")[0], []).append(content)
    (SEEDS / name).mkdir(parents=True, exist_ok=True)
    for kind, contents in kinds.items():
        for index, content in enumerate(contents[:most]):
            (SEEDS / name / f"{kind.replace(' ', '_')}_{index}").write_bytes(content)
            print(f"kept {kind}: {name}", file=sys.stderr)
