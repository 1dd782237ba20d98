"""Measures one step's sampling: exo's against llama.cpp's sampler chain, on 16 rows of 262,144 tokens. They take turns.

``python -m bench.sampling [--pairs N]`` takes the rows from the demo model, where both read them in llama.cpp's memory.
``llama_sampler_sample`` runs the chain row by row. Exits with status 1 if exo is not three times as fast.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import llama_cpp

from bench.servers import demo_model
from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_cuda.bindings import Context, Logits, Rows
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.sampling.sampler import Sampler, Turn, choose

ROWS = 16
PROMISED = 3.0


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    params: SamplingParams


CASES = (
    Case("greedy", SamplingParams(seed=1, temperature=0)),
    Case("top-k 40, top-p 0.95, temperature 0.8", SamplingParams(seed=1, temperature=0.8, top_k=40, top_p=0.95)),
)


class Chain:
    """llama.cpp's samplers for ``params``, in llama-server's order."""

    def __init__(self, params: SamplingParams, context: Context) -> None:
        self._context = context
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        stages = [llama_cpp.llama_sampler_init_greedy()]
        if params.temperature > 0:
            stages = [
                llama_cpp.llama_sampler_init_top_k(params.top_k),
                llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
                llama_cpp.llama_sampler_init_temp(params.temperature),
                llama_cpp.llama_sampler_init_dist(params.seed),
            ]
        for stage in stages:
            llama_cpp.llama_sampler_chain_add(self._chain, stage)

    def choose(self, row: int) -> int:
        return llama_cpp.llama_sampler_sample(self._chain, self._context.handle, row)


def rows() -> tuple[Context, Logits]:
    """Computes sixteen sequences of one token."""
    options = CudaOptions(path=str(demo_model()), slots=ROWS, n_gpu_layers=0, threads=1)
    log = Log()
    model = Model(demo_model(), options, (), lambda _: None, log)
    context = Context(model, options, 256, Rows(step=ROWS, graph=ROWS, outputs=ROWS), log)
    batch = context.batch
    batch.tokens[:] = range(1000, 1000 + ROWS)
    batch.slots[:] = range(ROWS)
    batch.outputs[:] = 1
    context.decode(ROWS)
    return context, context.logits(ROWS)


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(case: Case, context: Context, logits: Logits, pairs: int) -> float:
    """Prints the medians of a case and returns the median ratio: how many times as fast exo is."""
    samplers, chain = [Sampler(case.params) for _ in logits], Chain(case.params, context)

    def ours(position: int) -> list[int | None]:
        return choose([Turn(sampler, row, position) for sampler, row in zip(samplers, logits, strict=True)])

    def theirs() -> list[int]:
        return [chain.choose(row) for row in range(ROWS)]

    if case.params.temperature == 0 and ours(0) != theirs():
        raise SystemExit(f"{case.name}: the tokens differ")
    turns = [(seconds(partial(ours, position)), seconds(theirs)) for position in range(pairs)]
    mine, chains = (statistics.median(each) * 1e3 for each in zip(*turns, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in turns)
    print(f"{case.name:<40} ours {mine:7.3f} ms, chain {chains:7.3f} ms for {ROWS} rows: {ratio:.2f} times")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.sampling", description=__doc__)
    parser.add_argument("--pairs", type=int, default=51)
    pairs = parser.parse_args().pairs
    context, logits = rows()
    slow = [case.name for case in CASES if measure(case, context, logits, pairs) < PROMISED]
    if slow:
        sys.exit(f"less than {PROMISED:g} times as fast: {', '.join(slow)}")


if __name__ == "__main__":
    main()
