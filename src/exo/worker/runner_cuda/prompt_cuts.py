"""Where prompts are cut into chunks, and where their prefill stops for checkpoints. No cut changes a result."""

from bisect import bisect_right

from exo.worker.runner_cuda.sequence import Sequence

MIN_CHUNK = 64
"""The minimum chunk length, also of a prompt's last chunk. A shorter prompt is one chunk. Flash attention uses another
kernel below 64 rows, so a shorter chunk would change the results."""
CHUNK_MULTIPLE = 8
"""The length of every chunk but the last is a multiple of this, because a matrix product takes rows in groups of four.
On a CPU, the cuts then do not change a bit of the results; other cuts moved logits of a Q4_K_M model by up to 4.6."""
SPACING = 4096
"""The most prompt tokens between two checkpoints of a model that needs them."""
TAIL = 504
"""The distance of a checkpoint from the prompt's end if it is unknown where the last message starts. The rest, with
what ``CHUNK_MULTIPLE`` may add, is one full step of the default size: another stop would make the first token 7 %
later."""
SCORED_ROWS = 32
"""The most rows of a step that give prompt log-probabilities. Each takes the memory of a row of logits."""


def chunk_end(sequence: Sequence, budget: int, least: int, most: int) -> int:
    """Returns where a prompt's next chunk of up to ``most`` tokens ends, which is its start if ``budget`` is too small.

    It ends at the prompt's next mark at the latest, and where a picture begins or ends. Neither the chunk nor the rest
    of the text or picture becomes shorter than ``least``: a rest that is too short to be cut may exceed the budget by
    up to ``least`` tokens. A picture whose tokens see each other is one chunk. A prompt with log-probabilities is cut
    at multiples of ``SCORED_ROWS`` instead.
    """
    start = sequence.n_computed
    picture = sequence.picture
    if picture is not None and picture.whole:
        return picture.stop if budget >= least else start
    end = min(next((mark for mark in sequence.marks if mark > start), len(sequence.tokens)), sequence.edge(start))
    missing = end - start
    size = min(budget, most)
    if sequence.prompt_logprobs is not None:
        reach = start + min(size, SCORED_ROWS)
        return len(sequence.tokens) if len(sequence.tokens) <= reach else reach // SCORED_ROWS * SCORED_ROWS
    if missing <= size:
        return end
    if budget < least:
        return start
    if missing < 2 * least <= most:
        return end
    size = min(size, max(missing - least, least))
    return start + max(_multiple(size), least)


def checkpoint_marks(sequence: Sequence, least: int, *, can_cut: bool) -> list[int]:
    """Returns where a prompt's prefill stops for checkpoints. Chunks have at least ``least`` tokens.

    These are the last message's start, or ``TAIL`` before the end if no message starts are known; one in every
    ``SPACING`` tokens, if possible where a message starts; and, unless cells ``can_cut`` off a single token, a place
    just before the end.
    """
    start, end = sequence.n_computed, sequence.n_prefill - least
    starts = [at for at in sequence.boundaries if start + least <= at <= end]
    wanted = starts[-1:] or [sequence.n_prefill - TAIL]
    if not can_cut:
        wanted.append(end)
    at = start + SPACING
    while at < end:
        before = bisect_right(starts, at)
        near = before > 0 and starts[before - 1] > at - SPACING // 2
        wanted.append(starts[before - 1] if near else at)
        at = wanted[-1] + SPACING
    marks: list[int] = []
    for stop in sorted(sequence.uncut(start + _multiple(each - start)) for each in wanted):
        if stop - (marks[-1] if marks else start) >= least:
            marks.append(stop)
    return marks


def with_mark(sequence: Sequence, length: int, least: int) -> list[int]:
    """Returns a prompt's marks with one at about ``length``, instead of those closer to it than ``least`` tokens.

    They stay as they are if a chunk before or after that mark would be shorter than ``least``.
    """
    stop = sequence.uncut(sequence.n_computed + _multiple(length - sequence.n_computed))
    if stop - sequence.n_computed < least or stop > sequence.n_prefill - least:
        return sequence.marks
    return sorted([*(mark for mark in sequence.marks if abs(mark - stop) >= least), stop])


def _multiple(length: int) -> int:
    """Returns the largest multiple of ``CHUNK_MULTIPLE`` that is not above ``length``."""
    return length // CHUNK_MULTIPLE * CHUNK_MULTIPLE
