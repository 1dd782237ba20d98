"""What is kept of a sequence so that another runner can go on where one died, and how often that is tried. Pure.

What holds: the text of the events taken so far and the text of the continuation are together the text of the
undisturbed run, since a runner makes text from the tokens alone and ``Generate.delivered`` has every token taken.
"""

from dataclasses import dataclass, field

from exo.worker.protocol.messages import Capabilities, Delta, ErrorCode, Failed, Generate, PromptLogprobs

FRUITLESS_REPLAYS = 3
"""How often in a row a request may be started again on one engine without that computing a token for anyone."""

UNLUCKY_REPLAYS = 16
"""The same, where others got further: then the request may not be to blame, but it may, and each time costs them."""

LONGEST_WAIT_SECONDS = 10.0
"""How long a request in flight waits for a runner that may not be started yet."""

DEATHS: frozenset[ErrorCode] = frozenset({"runner_died", "engine_error", "out_of_memory"})
"""Of a runner, not of a request: after these another process may do better."""


@dataclass(slots=True)
class ReplayBudget:
    """Replays left to a request. A token resets it, and so does another engine."""

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
        """Notes that ``runner`` died under the request; whether it may be tried again.

        ``produced_output`` if the process had computed a token, for this request or another.
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
    """One sequence, whichever runner computes it."""

    request: Generate
    budget: ReplayBudget = field(default_factory=ReplayBudget)
    _delivered: list[int] = field(default_factory=list[int])
    _prompt_told: int = 0
    """Tokens of the prompt whose log-probabilities are on their way."""

    def take(self, event: Delta) -> None:
        """Notes what is on its way to the client."""
        self._delivered += event.tokens
        self.budget.progressed()

    def untold(self, event: PromptLogprobs) -> PromptLogprobs:
        """What of this no runner before has told, which is now on its way to the client."""
        items = event.items[max(0, self._prompt_told - event.start) :]
        new = event.model_copy(update={"start": self._prompt_told, "items": items})
        self._prompt_told += len(items)
        return new

    def remainder(self) -> Generate:
        """What a runner is to be asked for now."""
        updates: dict[str, object] = {"delivered": (*self.request.delivered, *self._delivered)}
        if self._delivered:  # after all of the prompt
            updates["prompt_logprobs"] = None
        return self.request.model_copy(update=updates)


def other_model(first: Capabilities, now: Capabilities) -> str | None:
    """Why a request that one runner began cannot go on with another, whose model differs; None if it can.

    The prompt was made by the first one's chat template, and the tokens delivered are of its vocabulary.
    """
    if first.vocabulary != now.vocabulary:
        return f"its vocabulary has {now.vocabulary} tokens instead of {first.vocabulary}"
    if (first.chat_template or "").strip() != (now.chat_template or "").strip():
        return "its chat template is another one"
    if first.engine == now.engine and _file(first) != _file(now):
        return "its file is another one"
    return None


def _file(model: Capabilities) -> tuple[object, ...]:
    """What one engine tells of a model's file, which is always the same."""
    return model.model_bytes, model.special_tokens, model.special_ids, model.bos_token, model.eos_token


def spent(failed: Failed) -> Failed:
    """The failure of a request whose budget is spent."""
    message = f"the request was started again and again without getting further; at last {failed.message}"
    return failed.model_copy(update={"message": message})
