"""The memory of saved states."""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np
import numpy.typing as npt

State = npt.NDArray[np.uint8]


def new_state(size: int) -> State:
    """Returns ``size`` bytes of zeros in a mapping of its own, which has small pages.

    The allocator would ask for huge pages, and once the kernel has to move memory to make them, a state takes five
    times as long to write. The mapping is private because the pages of a shared one take half as long again to make.
    """
    if size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.uint8)
