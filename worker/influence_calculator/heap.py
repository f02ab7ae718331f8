"""What a worker process does with memory that it has freed: it keeps it for the next chunk.

Every chunk allocates the same buffers of megabytes. glibc maps each of them anew, and the system clears
every page, unless its threshold for that moves up by itself; Dask's nannies fix it at its start of 128 KiB,
because they set another threshold (mallopt(3): setting any of them ends the automatic).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

MIB = 2**20
# Numbers of malloc.h, and what they are set to.
_OPTIONS = {
    -3: ("MALLOC_MMAP_THRESHOLD_", 32 * MIB),  # the most that it takes
    -1: ("MALLOC_TRIM_THRESHOLD_", 256 * MIB),
    -2: ("MALLOC_TOP_PAD_", 64 * MIB),  # as much as a thread's heap: an empty one is kept, too
}
_OF_DASK = {"MALLOC_TRIM_THRESHOLD_": "65536"}
"""What a nanny sets where nobody has chosen."""


@cache
def keep_freed_memory() -> None:
    """In this process from now on.

    For processes that do nothing but compute chunks. It needs glibc, and an environment that chooses nothing
    else: with a `MALLOC_…_` variable of the user's own everything is left as it is.
    """
    if any(os.environ.get(name) not in (None, _OF_DASK.get(name)) for name, _ in _OPTIONS.values()):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for number, (_, value) in _OPTIONS.items():
        mallopt(number, value)
