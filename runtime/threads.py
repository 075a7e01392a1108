"""Input and output beside the computation, in one thread each.

    for case in read_ahead(paths, read_case):  # while one case is used, the next is read
        ...
    for row in write_behind(jobs):  # while one job writes, the next is computed
        ...

Both are lazy, keep the order of their items and hold only a few of them in memory.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result], ahead: int = 1) -> Iterator[Result]:
    """Yield read(item) for each item, while a thread reads the next `ahead` (1 or more) items.

    An error of `read` is raised where its result would have come, and no further item is read.
    """
    reads: collections.deque[Future[Result]] = collections.deque()
    remaining = iter(items)
    with ThreadPoolExecutor(1, "read") as pool:
        try:
            for item in itertools.islice(remaining, ahead):
                reads.append(pool.submit(read, item))
            while reads:
                result = reads.popleft().result()
                reads.extend(pool.submit(read, item) for item in itertools.islice(remaining, 1))
                yield result
        finally:
            for future in reads:
                future.cancel()


def write_behind(jobs: Iterable[Callable[[], Result]], behind: int = 1) -> Iterator[Result]:
    """Yield the result of each job. A thread runs the jobs, while `jobs` computes the next one.

    At most `behind` jobs wait or run meanwhile. An error of a job is raised where its result would have come.
    If `jobs` itself fails, the jobs it yielded before are finished first.
    """
    writes: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(1, "write") as pool:
        for job in jobs:
            writes.append(pool.submit(job))
            if len(writes) > behind:
                yield writes.popleft().result()
        while writes:
            yield writes.popleft().result()
