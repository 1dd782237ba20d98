"""The state with which a request continues on another runner, and how often it may. Pure.

Invariant: the text of the events taken so far, and the text of the continuation, are together the text of an
undisturbed run. A runner makes text from tokens alone, and ``Generate.delivered`` holds every token taken.
"""

from dataclasses import dataclass, field

from exo.worker.protocol.commands import Generate
from exo.worker.protocol.events import Capabilities, Delta, ErrorCode, Failed, PromptLogprobs

FRUITLESS_REPLAYS = 3
"""Replays in a row, on one kind of runner, of a request under which processes die before they compute any token."""

UNLUCKY_REPLAYS = 16
"""Replays of a request under which processes die that had computed tokens. The request may not be the cause, but each
death costs all other requests of the process a replay as well."""

LONGEST_WAIT_SECONDS = 10.0
"""How long a request in flight waits for a runner that may not be started yet."""

DEATHS: frozenset[ErrorCode] = frozenset({"runner_died", "engine_error", "out_of_memory"})
"""Failures of a runner, not of a request: another process may succeed."""


@dataclass(slots=True)
class ReplayBudget:
    """The replays left to a request. A token resets it, and so does a change of runner."""

    _fruitless: int = 0
    _unlucky: int = 0
    _runner: str = ""

    @property
    def untouched(self) -> bool:
        """Whether no runner has died under the request since its last token, or ever."""
        return self._fruitless == self._unlucky == 0

    def progressed(self) -> None:
        """Notes a token."""
        self._fruitless = self._unlucky = 0

    def allows_replay(self, runner: str, *, produced_output: bool) -> bool:
        """Notes that ``runner`` died under the request; whether the request may be replayed.

        ``produced_output``: the process had computed a token, for this request or another.
        """
        if runner != self._runner:
            self._fruitless = self._unlucky = 0
            self._runner = runner
        if produced_output:
            self._unlucky += 1
            self._fruitless = 0
        else:
            self._fruitless += 1
        return self._fruitless <= FRUITLESS_REPLAYS and self._unlucky <= UNLUCKY_REPLAYS


@dataclass(slots=True)
class Replay:
    """One sequence, over all its runners."""

    request: Generate
    budget: ReplayBudget = field(default_factory=ReplayBudget)
    _delivered: list[int] = field(default_factory=list[int])
    _prompt_delivered: int = 0  # tokens of the prompt whose log-probabilities were delivered

    @property
    def n_delivered(self) -> int:
        """Tokens of output that were delivered to the client."""
        return len(self._delivered)

    def take(self, event: Delta) -> None:
        """Records tokens that are delivered to the client."""
        self._delivered += event.tokens
        self.budget.progressed()

    def undelivered(self, event: PromptLogprobs) -> PromptLogprobs:
        """Returns the prompt's log-probabilities that were not delivered before, and counts them as delivered."""
        items = event.items[max(0, self._prompt_delivered - event.start) :]
        new = event.model_copy(update={"start": self._prompt_delivered, "items": items})
        self._prompt_delivered += len(items)
        return new

    def remainder(self) -> Generate:
        """The request for the next runner."""
        updates: dict[str, object] = {"delivered": (*self.request.delivered, *self._delivered)}
        if self._delivered:  # the prompt's log-probabilities precede the first token, so all were delivered
            updates["prompt_logprobs"] = None
        return self.request.model_copy(update=updates)


_BOTH = (False, True)


def other_model(first: Capabilities, now: Capabilities) -> str | None:
    """Why a request cannot continue on a runner with another model than its first runner's; None if it can.

    The first runner's chat template made the prompt, and the delivered tokens are of its vocabulary.
    """
    if first.vocabulary != now.vocabulary:
        return f"its vocabulary has {now.vocabulary} tokens instead of {first.vocabulary}"
    if any((first.template(tools=tools) or "").strip() != (now.template(tools=tools) or "").strip() for tools in _BOTH):
        return "its chat template differs"
    if first.engine == now.engine and _file(first) != _file(now):
        return "its model file differs"
    return None


def _file(model: Capabilities) -> tuple[object, ...]:
    """Returns the properties that identify a model file within one engine."""
    return model.model_bytes, model.special_tokens, model.special_ids, model.bos_token, model.eos_token


def spent(failed: Failed) -> Failed:
    """The failure of a request whose budget is spent."""
    message = f"the request was restarted repeatedly without progress; the last failure: {failed.message}"
    return failed.model_copy(update={"message": message})
