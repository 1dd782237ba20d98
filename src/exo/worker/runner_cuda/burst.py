"""A burst: short prompts that are computed while no sequence has had its second token."""

from collections.abc import Sequence

from exo.worker.runner_cuda.step_time import Pace

MOST_BOUNDS = 4
"""The first streams wait for the other prompts if these take no more than so many times the bound of ``Pace``."""
EARLY = 9 / 16
"""The share of the prompts that get their first tokens one after another. In a large burst it includes the median."""


class Burst:
    """Decides whether the first streams of a burst wait for the other prompts.

    A decode step after each few prompts would stop every stream that has begun each time. One pause after the first
    token is shorter than those together.
    """

    def __init__(self, pace: Pace, budget: int, longest: int) -> None:
        """Streams wait for prompts of up to ``longest`` tokens, and for ``budget`` tokens of all prompts."""
        self._pace = pace
        self._budget = budget
        self._longest = longest
        self._computed: int | None = 0  # prompt tokens since the first stream began; None from its second token on

    def begin(self) -> None:
        """Call it while no sequence has a token to decode."""
        self._computed = 0

    def prefilled(self, n_rows: int) -> None:
        """Notes a prefill step during which sequences with a token waited."""
        if self._computed is not None:
            self._computed += n_rows

    def end(self) -> None:
        """Call it with each decode step."""
        self._computed = None

    def waits(self, missing: Sequence[int]) -> bool:
        """Whether the streams that have begun wait for the other prompts, which miss so many tokens."""
        if self._computed is None or max(missing, default=0) > self._longest:
            return False
        total = self._computed + sum(missing)
        return total <= self._budget and self._pace.prompt_seconds(total) <= MOST_BOUNDS * self._pace.bound

    def left(self, left: int, usual: int) -> int:
        """Returns how many of ``left`` prompt tokens remain before the next decode step if the streams do not wait.

        ``usual`` is the number of prompt tokens between two decode steps.
        """
        return left if self._computed is None else min(left, usual - self._computed)


def is_late(n_begun: int, n_prompts: int) -> bool:
    """Whether the ``n_prompts`` of a burst that are left share a step; ``n_begun`` sequences have their first token."""
    return n_begun >= int(EARLY * (n_begun + n_prompts))
