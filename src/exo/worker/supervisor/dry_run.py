"""Asks a runner how it would load a model, without loading it."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import ValidationError

from exo.start_process import start_process
from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Estimated, Failed
from exo.worker.protocol.wire import decode_event, encode
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.placement_plan import PlacementPlan

_ESTIMATE_SECONDS = 30.0
_LONGEST_LINE = 8 << 20


async def dry_run(
    command: Sequence[str],
    load: Load,
    runner: str,
    capacity: Memory,
    there: Callable[[Estimated], Estimated] | None = None,
    *,
    forced: bool = False,
) -> PlacementPlan | None:
    """Asks a new process of a runner how it would load a model if no other model were loaded.

    ``runner`` is its name. ``there`` makes the estimate of a runner on another host one by account. ``forced``: the
    model is loaded even if it does not fit. Returns None without an answer or without the model's files.
    """
    answer = await _estimate(command, load)
    if isinstance(answer, Failed) and answer.code != "model_not_found":
        return PlacementPlan(problem=answer.message)
    if not isinstance(answer, Estimated):
        return None
    answer = answer if there is None else there(answer)
    return decided(load.model_id, runner, answer, capacity, forced=forced)


def decided(model_id: str, runner: str, answer: Estimated, capacity: Memory, *, forced: bool = False) -> PlacementPlan:
    """Returns the memory budget's decision on a runner's answer, with no other model loaded."""
    budget = MemoryBudget(capacity)
    budget.enter(runner, now := time.monotonic(), forced=forced)
    budget.estimate(runner, answer)
    actions = budget.settle(now)
    if (refusal := actions.refused.get(runner)) is not None:
        return PlacementPlan(problem=refusal.message(model_id, runner))
    reservation = budget.reservation(runner)
    if reservation is None or reservation.too_large is None:
        return PlacementPlan.of(answer, actions.granted[runner], budget, capacity)
    plan = PlacementPlan.of(answer, answer.choices[-1], budget, capacity)  # as estimated, and not as reserved
    return plan.model_copy(update={"notes": (*plan.notes, reservation.too_large.forced_note(model_id))})


async def _estimate(command: Sequence[str], load: Load) -> Estimated | Failed | None:
    """The runner's answer; None if there is none in time."""
    with anyio.move_on_after(_ESTIMATE_SECONDS):
        process = await start_process(command, stderr=subprocess.DEVNULL)
        async with process:
            assert process.stdin is not None
            assert process.stdout is not None
            lines = BufferedByteReceiveStream(process.stdout)
            try:
                await process.stdin.send(encode(Estimate(load=load)))
                while True:
                    event = decode_event(await lines.receive_until(b"\n", _LONGEST_LINE))
                    if isinstance(event, Estimated | Failed):
                        return event
            except (anyio.BrokenResourceError, anyio.IncompleteRead):
                return None  # the runner has ended
            except (anyio.DelimiterNotFound, ValidationError):
                return None  # it is another version of exo
            finally:
                with suppress(ProcessLookupError):  # it may have ended by itself
                    process.terminate()
    return None
