from typing import Self

from pydantic import BaseModel


class Memory(BaseModel):
    in_bytes: int = 0

    @classmethod
    def from_bytes(cls, size: int) -> Self:
        return cls(in_bytes=size)
