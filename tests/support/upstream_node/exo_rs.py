"""Stands for upstream's Rust bindings on one machine: a file for the process id, and a network without others.

Upstream imports it by this name. The bindings are in no package registry.
"""

import asyncio
import os


class PidfileError(Exception):
    pass


class Pidfile:
    def __init__(self, path: str, mode: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, mode)

    def write(self) -> None:
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def as_raw_fd(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)


class FromSwarm:
    class Connection:
        __match_args__ = ("connected",)
        connected: bool

    class Message:
        __match_args__ = ("topic", "data")
        topic: str
        data: bytes


class NetworkingHandle:
    @staticmethod
    def new(*_: object) -> "NetworkingHandle":
        return NetworkingHandle()

    async def recv(self) -> None:
        await asyncio.Event().wait()

    async def gossipsub_subscribe(self, _topic: str) -> bool:
        return True

    async def gossipsub_unsubscribe(self, _topic: str) -> bool:
        return True

    async def gossipsub_publish(self, _topic: str, _data: bytes) -> None:
        return None
