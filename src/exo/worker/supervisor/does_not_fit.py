"""Why a model does not fit the memory budget."""

from dataclasses import dataclass

from pydantic_core import to_json

from exo.worker.protocol.events import LoadOption
from exo.worker.supervisor.memory import HOST, Memory


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why a model cannot be loaded. ``room`` is the memory that would be free without all unpinned runners."""

    needed: Memory
    room: Memory
    remedies: tuple[LoadOption, ...]
    """For each setting, the smallest change with which the model would fit."""

    def needs(self, model_id: str) -> str:
        """What the model needs, and what there is, in words."""
        short = [
            f"{needed:,} bytes of {'memory' if name == HOST else f'memory on {name}'}, "
            f"and at most {room:,} can be freed for it"
            for name, needed, room in self.needed.beyond(self.room)
        ]
        return f"{model_id} needs {' and '.join(short)} here"

    def message(self, model_id: str, runner: str) -> str:
        """The error message for the client."""
        text = self.needs(model_id)
        if not self.remedies:
            return f"{text}; no setting of [{runner}] in its model card would make it fit"
        ways = (
            " and ".join(f"{key} = {to_json(value).decode()}" for key, value in each.settings.items())
            for each in self.remedies
        )
        return f"{text}; with {', or '.join(ways)} in [{runner}] of its model card it would fit"
