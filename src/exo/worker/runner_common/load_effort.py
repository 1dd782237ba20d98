"""CPU time and bytes read by this process and its children, which show whether a load makes progress."""

import resource
import time
from contextlib import suppress
from typing import NamedTuple

import psutil

_BLOCK = 512
"""Bytes of a block, as ``getrusage`` counts them."""


class Effort(NamedTuple):
    """``bytes_read`` are from disks and network file systems, for files that are mapped into memory as well."""

    cpu_seconds: float
    bytes_read: int


def effort() -> Effort:
    """Since the process started, without what the calling thread computed."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(each.ru_utime + each.ru_stime for each in (own, ended)) - time.thread_time()
    # File systems in user space count no blocks, but a page of theirs that is missing is a major fault.
    read = sum(each.ru_inblock * _BLOCK + each.ru_majflt * resource.getpagesize() for each in (own, ended))
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            cpu += times.user + times.system
            read += _read_by(child)
    return Effort(cpu, read)


def _read_by(child: psutil.Process) -> int:
    try:
        return int(child.io_counters().read_bytes)
    except (AttributeError, psutil.AccessDenied):  # not on macOS
        return 0
