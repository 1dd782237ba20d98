"""Measures how much of an agent's prompt is computed again, beside llama-server.

``python -m bench.agent [--tokens N] [--pairs N] [--only exo]`` asks the demo model in two slots and prints, for each of
five steps, the prompt tokens computed and the time to the first token: a cold prompt, its tail changed, a turn of some
290 new tokens, the same prompt after three side prompts, and with the last reply changed after three more. With
``--turns N``, a cold prompt and N turns, each of which drops the first half of the last reply, as templates drop
reasoning.
"""

import argparse
import asyncio
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from pydantic_core import to_json

from bench.servers import MeasuredServer, demo_server, end_within, llama_server, set_up_peers
from bench.streams import client_of
from exo.bench.client import Exchange
from exo.bench.reading import StreamedReply, read

SLOTS = 2
REPLY_TOKENS, TURN_WORDS, SIDE_WORDS = 48, 280, 400
TAIL = 0.1
"""The share of the prompt that the second step changes."""
WORDS = ("river", "stone", "winter", "garden", "table", "window", "letter", "music", "paper", "silver", "market")
_LIMIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's reply, its prompt tokens, those that were not cached, and the milliseconds to the first token."""

    text: str
    prompt: int
    computed: int
    first_ms: float


def ask(server: MeasuredServer, prompt: str) -> Answer:
    """Streams a completion. Exits unless the reply is complete."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": REPLY_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    exchange, reply = Exchange(to_json(body)), StreamedReply()
    asyncio.run(client_of(server.url).send(exchange))
    for moment, data in exchange.pieces:
        reply.feed(moment, data)
    outcome = read(exchange)
    if outcome.fault is not None:
        raise SystemExit(f"{server.name}: {outcome.fault.message}")
    length = outcome.prompt_tokens
    return Answer(reply.text, length, length - (outcome.cached_tokens or 0), 1000 * outcome.ttft)


def words(dice: random.Random, count: int) -> str:
    """Returns text of about one token a word."""
    return "".join(" " + dice.choice(WORDS) for _ in range(count))


def conversation(server: MeasuredServer, tokens: int, seed: int) -> Iterator[tuple[str, Answer]]:
    """Yields each step's name and answer. Equal arguments send equal prompts."""
    dice = random.Random(seed)
    stem, tail, other = (words(dice, count) for count in (int(tokens * (1 - TAIL)), *[int(tokens * TAIL)] * 2))
    yield "cold", ask(server, f"{seed}{stem}{tail}")
    prompt = f"{seed}{stem}{other}"
    answer = ask(server, prompt)
    yield "tail changed", answer
    turn = _turn(dice)
    yield "a turn later", ask(server, prompt + answer.text + turn)
    _side_prompts(server, dice)
    yield "back after side prompts", ask(server, prompt + answer.text + turn)
    _side_prompts(server, dice)
    yield "back with another reply", ask(server, prompt + words(dice, REPLY_TOKENS) + turn)


def long_conversation(server: MeasuredServer, tokens: int, turns: int, seed: int) -> Iterator[tuple[str, Answer]]:
    """Yields the cold prompt's answer and one for each turn."""
    dice = random.Random(seed)
    prompt = f"{seed}{words(dice, tokens)}"
    answer = ask(server, prompt)
    yield "cold", answer
    for turn in range(2, turns + 2):
        prompt += answer.text[len(answer.text) // 2 :] + _turn(dice)
        answer = ask(server, prompt)
        yield f"turn {turn}", answer


def _turn(dice: random.Random) -> str:
    return "\n\nUser:" + words(dice, TURN_WORDS) + "\n\nAssistant:"


def _side_prompts(server: MeasuredServer, dice: random.Random) -> None:
    for _ in range(3):
        ask(server, f"{dice.random()}{words(dice, SIDE_WORDS)}")


def _resident(process: psutil.Process) -> int:
    """Returns the resident memory of a server and its runners, in MiB."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) >> 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.agent", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000, help="of the first prompt, about")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--turns", type=int, default=0, help="measure that many turns instead of the five steps")
    parser.add_argument("--only", choices=["exo"], help="without llama-server")
    arguments = parser.parse_args()
    context = -(-(arguments.tokens + 1024 + arguments.turns * (TURN_WORDS + REPLY_TOKENS)) // 1024) * 1024
    if arguments.only is None:
        set_up_peers()
    end_within(_LIMIT_SECONDS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        servers = [demo_server(Path(folder) / "exo", (f"n_ctx = {context}", f"slots = {SLOTS}"))]
        servers += [] if arguments.only else [llama_server(SLOTS, context)]
        started = [running.enter_context(each.running(Path(folder) / f"{each.name}.log")) for each in servers]
        found: dict[tuple[str, str], list[Answer]] = {}
        for pair in range(arguments.pairs):
            for server in servers if pair % 2 else servers[::-1]:
                steps = (
                    long_conversation(server, arguments.tokens, arguments.turns, pair)
                    if arguments.turns
                    else conversation(server, arguments.tokens, pair)
                )
                for step, answer in steps:
                    found.setdefault((step, server.name), []).append(answer)
        for (step, name), answers in found.items():
            length, computed = median(each.prompt for each in answers), median(each.computed for each in answers)
            first = median(each.first_ms for each in answers)
            print(f"{step:<26} {name:<14} {computed:7.0f} of {length:7.0f} tokens computed, first {first:8.0f} ms")
        for server, process in zip(servers, started, strict=True):
            print(f"{server.name:<14} {_resident(psutil.Process(process.pid)):,} MiB resident at the end")


if __name__ == "__main__":
    main()
