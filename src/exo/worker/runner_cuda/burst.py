"""A burst: short prompts that arrive while no sequence has had its second token."""

from collections.abc import Sequence

from exo.worker.runner_cuda.step_time import Pace

MOST_BOUNDS = 4
"""The prompts of a burst take no more than so many times the bound of ``Pace``, in two groups of about half of that."""
EARLY = 9 / 16
"""The share of the streams that begin with the first group. In a large burst it includes the median."""


class Burst:
    """Decides how many prompts of a burst are computed before the streams that have begun decode again.

    A decode step after each few prompts would stop every stream that has begun each time. All prompts are computed
    first if the bound allows that. Otherwise they form two groups with a decode step between: most streams then stop
    once at most, and get their second tokens before.
    """

    def __init__(self, pace: Pace, budget: int, longest: int) -> None:
        """Prompts of up to ``longest`` tokens, and ``budget`` tokens of all prompts together, form a burst."""
        self._pace = pace
        self._budget = budget
        self._longest = longest
        self._computed = 0  # prompt tokens since the first stream began
        self._decoded = False  # whether a decode step has followed
        self._open = True
        self.has_granted = False
        """Whether ``grant`` has returned tokens since the last decode step."""
        self._in_groups = False

    def begin(self) -> None:
        """Call it while no sequence has a token to decode."""
        self._computed, self._decoded, self._open, self.has_granted = 0, False, True, False

    def prefilled(self, n_rows: int) -> None:
        """Notes a prefill step during which sequences with a token waited."""
        self._computed += n_rows

    def decoded(self, n_prompts: int) -> None:
        """Notes a decode step while ``n_prompts`` were left."""
        self._open = self.has_granted and n_prompts > 0
        self._decoded, self.has_granted = True, False

    def grant(self, missing: Sequence[int], n_begun: int) -> int:
        """Returns how many prompt tokens are computed before the next decode step; 0 if there is no burst.

        ``missing`` are the missing tokens of each prompt, and ``n_begun`` sequences have had a token.
        """
        if not self._open or self.has_granted or max(missing, default=0) > self._longest:
            return 0
        total = self._computed + sum(missing)
        seconds = self._pace.prompt_seconds(total)
        if total > self._budget or seconds > MOST_BOUNDS * self._pace.bound:
            return 0
        self._in_groups = self._decoded or seconds > self._pace.bound
        n_first = _n_early(n_begun, len(missing)) - n_begun
        self.has_granted = bool(missing)
        return sum(missing[:n_first] if self._in_groups and n_first > 0 else missing)

    def share_a_step(self, n_begun: int, n_prompts: int) -> bool:
        """Whether the next prompts are computed together. The first ones of a short burst begin one after another."""
        return self.has_granted and (self._in_groups or n_begun >= _n_early(n_begun, n_prompts))

    def left(self, left: int, usual: int) -> int:
        """Returns how many of ``left`` prompt tokens remain before the next decode step outside a burst.

        ``usual`` is the number of prompt tokens between two decode steps.
        """
        return left if self._decoded else min(left, usual - self._computed)


def _n_early(n_begun: int, n_prompts: int) -> int:
    """Returns how many of the streams of a burst belong to the first group."""
    return int(EARLY * (n_begun + n_prompts))
