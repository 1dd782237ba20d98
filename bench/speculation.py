"""What guessing ahead brings and costs: text that repeats itself and text that does not, one stream, paired.

``python -m bench.speculation MODEL.gguf [--pairs N] [--tokens N] [--draft SMALL.gguf] [--json FILE]``: runners with
``speculate`` "off" and "auto", and with a draft model a third, are loaded side by side and take turns, each beginning
a round as often as the others. Printed are the medians of the pairs' ratios of output rates, with "off" as 1, how many
tokens a step gave, and how many of the texts, greedy as they are, differ from those without guesses. Repeated text is
what a model says after a passage four times over; fresh text follows prompts that have nothing twice.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from pydantic import JsonValue

from bench.prefix import Runner

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


def measure(runners: dict[str, Runner], pairs: int, tokens: int) -> dict[str, JsonValue]:
    """For each text and each runner but the first: ratios to the first's rate, its own rates, texts that differ."""
    results: dict[str, JsonValue] = {}
    names = list(runners)
    for what, write in _TEXTS.items():
        rates: dict[str, list[float]] = defaultdict(list)
        per_step: dict[str, list[float]] = defaultdict(list)
        differing = dict.fromkeys(names, 0)
        for pair in range(-1, pairs):  # the first round is not counted: in it, "auto" learns how long steps take
            said: dict[str, list[int]] = {}
            prompt = write(_TOPICS[pair % len(_TOPICS)])
            for name in names[pair % len(names) :] + names[: pair % len(names)]:
                stream = runners[name].start(prompt, tokens)
                runners[name].finish([stream])
                said[name] = stream.tokens
                if pair >= 0:
                    rates[name].append(stream.rate)
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
    """A line for each text and runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--draft")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tables: dict[str, dict[str, JsonValue]] = {"off": {"speculate": "off"}, "auto": {"speculate": "auto"}}
    if arguments.draft is not None:
        tables["draft model"] = {"speculate": "auto", "draft": {"path": arguments.draft}}
    runners = {name: Runner(arguments.path, slots=1, n_ctx=2048, **table) for name, table in tables.items()}
    results = measure(runners, arguments.pairs, arguments.tokens)
    for runner in runners.values():
        runner.stop()
    for name, found in results.items():
        assert isinstance(found, dict)
        ratios = f"{found['ratio']:.3f} of off ({found['lowest']:.3f} to {found['highest']:.3f})"
        texts = f"{found['differing']} of {found['texts']} texts differ"
        print(f"{name}: {found['tokens_per_second']:.1f} tokens/s, {ratios}, {found['per_step']:.2f} a step, {texts}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
