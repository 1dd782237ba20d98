from typing import Generic, TypeVar

_T = TypeVar("_T")


class MpReceiver(Generic[_T]):
    def __init__(self) -> None:
        self.items: list[_T] = []

    def collect(self) -> list[_T]:
        taken, self.items = self.items, []
        return taken
