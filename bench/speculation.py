"""Measures speculative decoding with one stream, on text that repeats itself and on text that does not.

``python -m bench.speculation MODEL.gguf [--pairs N] [--tokens N] [--draft SMALL.gguf] [--json FILE]``: runners with
``speculate`` "off" and "auto", and a third with a draft model, are loaded side by side and take turns; each begins a
round equally often. Prints the medians of the pairs' ratios to the output rate of "off", the tokens per step, and the
number of texts, which are greedy, that differ from those of "off". Repeated text continues a passage that came four
times; fresh text follows prompts without repetitions.
"""

import argparse
import json
import statistics
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from pydantic import JsonValue

from bench.direct_runner import DirectRunner
from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS

_TOPICS = (
    "a lighthouse keeper", "two sisters and a boat", "the price of bread", "a lost map", "how bees find their way",
    "an old clock", "a winter market", "the first train", "a quiet library", "the river in spring",
)  # fmt: skip


def _repeated(topic: str) -> str:
    passage = (
        f"Once there was a story about {topic}. Every morning the people of the town came to the square, asked what"
        f" had happened with {topic}, and went home again, for nobody knew. "
    )
    return passage * 4 + passage[:30]


def _fresh(topic: str) -> str:
    return f"Write down all that comes to your mind about {topic}.\n\n"


_TEXTS = {"repeated": _repeated, "fresh": _fresh}


def measure(runners: dict[str, DirectRunner], pairs: int, tokens: int) -> dict[str, JsonValue]:
    """For each text and runner: its rates, their ratios to those of the first runner, and texts that differ."""
    results: dict[str, JsonValue] = {}
    names = list(runners)
    for what, write in _TEXTS.items():
        rates: dict[str, list[float]] = defaultdict(list)
        per_step: dict[str, list[float]] = defaultdict(list)
        differing = dict.fromkeys(names, 0)
        for pair in range(-1, pairs):  # not counted: in the first round "auto" measures its steps
            said: dict[str, list[int]] = {}
            prompt = write(_TOPICS[pair % len(_TOPICS)])
            for name in names[pair % len(names) :] + names[: pair % len(names)]:
                stream = runners[name].generate(prompt, tokens)
                said[name] = stream.tokens
                if pair >= 0:
                    rates[name].append((len(stream.times) - 1) / (stream.times[-1] - stream.times[0]))
                    per_step[name].append(len(stream.times) / len(set(stream.times)))
            for name in names:
                differing[name] += pair >= 0 and said[name] != said[names[0]]
        for name in names:
            ratios = [mine / other for mine, other in zip(rates[name], rates[names[0]], strict=True)]
            results[f"{what}, {name}"] = {
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "tokens_per_second": statistics.median(rates[name]),
                "per_step": statistics.median(per_step[name]),
                "texts": pairs,
                "differing": differing[name],
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.speculation", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--draft")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tables: dict[str, dict[str, JsonValue]] = {"off": {"speculate": "off"}, "auto": {"speculate": "auto"}}
    if arguments.draft is not None:
        tables["draft model"] = {"speculate": "auto", "draft": {"path": arguments.draft}}
    with ExitStack() as running:
        runners: dict[str, DirectRunner] = {}
        for name, table in tables.items():
            common: dict[str, JsonValue] = {"path": arguments.path, "n_gpu_layers": 0, "slots": 1, "n_ctx": 2048}
            load = Load(model_id="bench", backend="LlamaCppCpu", table={**common, **table})
            runners[name] = running.enter_context(DirectRunner(RUNNERS["cuda"].command, load))
        results = measure(runners, arguments.pairs, arguments.tokens)
    for name, found in results.items():
        assert isinstance(found, dict)
        ratios = f"{found['ratio']:.3f} of off ({found['lowest']:.3f} to {found['highest']:.3f})"
        texts = f"{found['differing']} of {found['texts']} texts differ"
        print(f"{name}: {found['tokens_per_second']:.1f} tokens/s, {ratios}, {found['per_step']:.2f} a step, {texts}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
