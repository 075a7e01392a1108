"""How many threads a CPU computes with: measured, because other programs decide it.

A layer is shared out among threads and ends with the slowest. Where another program takes one of two cores
for a while, every layer waits for that core, and two threads can be ten times slower than one.
"""

import statistics
import time
from collections.abc import Callable

import torch

from runtime.log import log

ROUNDS = 3  # timed steps per number of threads
WORTH = 0.9  # of the time now: less of a gain is no reason to change

_most = torch.get_num_threads()  # the cores, or what OMP_NUM_THREADS says


def choose_threads(step: Callable[[], None]) -> None:
    """Let torch compute with the number of threads at which `step` is fastest; log a change.

    Tried are the number torch started with (the cores, or OMP_NUM_THREADS) and its halves down to one. The
    times are medians of steps taken in turn, after one that is not timed. With another number of threads sums
    may round differently; OMP_NUM_THREADS=1 keeps a run exact to the bit.
    """
    candidates = [_most]
    while candidates[-1] > 1:
        candidates.append(candidates[-1] // 2)
    if len(candidates) == 1:
        return
    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {count: [] for count in candidates}
    for turn in range(ROUNDS + 1):
        for count in candidates:
            torch.set_num_threads(count)
            started = time.perf_counter()
            step()
            if turn:
                seconds[count].append(time.perf_counter() - started)
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    fastest = min(candidates, key=medians.__getitem__)
    if medians[fastest] > WORTH * medians[before]:
        fastest = before
    torch.set_num_threads(fastest)
    if fastest != before:
        log.info(
            "computing with %d of %d threads, the fastest now: %s",
            fastest,
            _most,
            ", ".join(f"{count}: {1000 * medians[count]:.0f} ms" for count in candidates),
        )
