"""How many threads compute a step, found out by trying with the model at hand.

llama.cpp has two counts: for a step of one row, which is mostly waiting for memory, and for steps of more. The second
changes no results, bit for bit. The first does in contexts of 512 tokens and more, which flash attention shares out
among the threads: there one thread gives what several give in company, so that the same count at each start matters.
"""

import time
from collections.abc import Callable
from statistics import median

from exo.worker.runner_cuda.llama import Context

WORTH_LAST_CORE = 1.03
"""How many times as fast the last core has to make a step of one row. Where all cores compute, whatever else a token
takes, such as its text, the server and the client, stops a thread for which the others then wait."""
WORTH_HYPERTHREADS = 1.05
"""How many times as fast a second thread on each core has to make a step of many rows."""
_ROWS = 16
_TURNS, _SECONDS = 7, 0.5


def choose(few: int, many: int, worth: float, seconds: Callable[[int], float]) -> int:
    """``many`` threads if they are ``worth`` times as fast as ``few``, by the median of tries that take turns.

    ``seconds`` tells what a step by so many threads takes. It is not asked where ``many`` cannot be that much faster,
    or where there is nothing to choose.
    """
    if few < 1 or many < worth * few:
        return max(few, 1)
    began, gains = time.monotonic(), list[float]()
    while not gains or (len(gains) < _TURNS and time.monotonic() < began + _SECONDS):
        gains.append(seconds(few) / seconds(many))
    return many if median(gains) >= worth else few


def settle(context: Context, cores: int, hyperthreads: int) -> tuple[int, int]:
    """Has ``context``, which is empty and warm, use the counts that suit its model here: of one row, of more.

    ``hyperthreads`` are what the ``cores`` can run at a time. With 35 cores or more without hyperthreads, the last core
    is left to the rest without a try; with hyperthreads there is room for it beside all cores.
    """

    def seconds(n_rows: int) -> Callable[[int], float]:
        def of(threads: int) -> float:
            context.use_threads(threads, threads)
            began = time.perf_counter()
            context.decode(n_rows)
            taken = time.perf_counter() - began
            context.trim(0, 0)
            return taken

        return of

    n_rows = min(_ROWS, len(context.batch.tokens))
    batch = context.batch
    batch.tokens[:n_rows] = batch.slots[:n_rows] = batch.outputs[:n_rows] = 0
    batch.positions[:n_rows] = range(n_rows)
    batch.outputs[0] = 1
    several = choose(cores, hyperthreads, WORTH_HYPERTHREADS, seconds(n_rows))
    one = choose(cores - 1, cores, WORTH_LAST_CORE, seconds(1)) if hyperthreads == cores else cores
    context.use_threads(one, several)
    return one, several
