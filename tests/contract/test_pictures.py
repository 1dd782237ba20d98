"""Pictures in prompts: what every runner refuses, and what those with a model that sees them do."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Generate, Picture, Sibling, Text, Tokenize
from exo.worker.protocol.messages import PICTURE_PIXELS
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.contract.cases import LLAMA_BACKEND, Case, Shared, Table, goes_on_from_everywhere, one
from tests.support.pictures import picture_of, random_picture, random_png
from tests.support.program import Program, ask, names, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.gguf_file import write_flat_gguf
from tests.support.tiny.hybrid import write_hybrid
from tests.support.tiny.projector import TOKENS, Kind, write_projector
from tests.support.tiny.seeing_folder import TOKENS as FOLDER_TOKENS
from tests.support.tiny.seeing_folder import write_seeing

BEFORE, AFTER = "Here is what the camera saw: ", "Describe it in a word."
CAT, DOG = random_picture(1), random_picture(2)

name = names()


LLAMA = tuple(runner_command(RUNNERS["cuda"].module))


def plain(path: Path) -> None:
    write_gguf(path, Shape())


def windowed(path: Path) -> None:
    write_gguf(path, Shape("gemma3"))


def llama(kind: Kind, write: Callable[[Path], None] = plain, **table: JsonValue) -> Case:
    def complete(folder: Path) -> Table:
        path, projector = folder / f"{write.__name__}.gguf", folder / f"mmproj-{kind}.gguf"
        if not path.exists():
            write(path)
        if not projector.exists():
            write_projector(projector, kind, Shape().hidden)
        exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
        return {"path": str(path), "mmproj": projector.name, **exact, **table}

    return Case(LLAMA, LLAMA_BACKEND, complete)


def vllm_table(folder: Path) -> Table:
    path = folder / "seeing"
    if not path.exists():
        write_seeing(path, Shape(head_dim=64))
    return {"path": str(path), "pictures": True, "dtype": "float32", "threads": 1}


VLLM = Case(RUNNERS["vllm"].command, "Vllm", vllm_table, cache_block=32)
SEEING: Mapping[str, Case] = {
    "whole": llama("gemma3"),
    "causal": llama("mlp"),
    "flat": llama("qwen2vl_merger", write_flat_gguf),
    "window": llama("gemma3", windowed),
    "hybrid": llama("mlp", write_hybrid),
    "pool": llama("mlp", kv="pool"),
    "rpc": replace(llama("gemma3"), command=llama_command("LlamaCppCuda"), backend="LlamaCppCuda"),
    "vllm": VLLM,
}
"""Models whose pictures are computed whole, token by token, or in rows and columns; with window layers, with recurrent
layers, with a pool, and on a device."""
MARKS: Mapping[Kind, tuple[str, ...]] = {
    "gemma3": ("<start_of_image>", "<end_of_image>"),
    "mlp": (),
    "qwen2vl_merger": ("<|vision_start|>", "<|vision_end|>"),
}
"""What stands around a picture."""


@pytest.fixture(scope="module")
def seers(folder: Path) -> Iterator[Shared]:
    runners = Shared(folder)
    yield runners
    runners.stop()


@pytest.fixture(params=[pytest.param(each, marks=needs_vllm) if each == "vllm" else each for each in SEEING])
def seer(request: pytest.FixtureRequest, seers: Shared) -> Program:
    return seers.program(SEEING[request.param])


@pytest.fixture(params=[each for each in SEEING if each not in ("hybrid", "vllm")])
def cutting_seer(request: pytest.FixtureRequest, seers: Shared) -> Program:
    """One that can use any prefix of a prompt again."""
    return seers.program(SEEING[request.param])


def n_tokens(program: Program, text: str) -> int:
    (result,) = program.generate(Tokenize(id=next(name), prompt=(Text(text=text),)))
    return len(result.tokenized.tokens)


def look(*parts: str | Picture, **settings: object) -> Generate:
    """A greedy request. Texts of a prompt have no control tokens."""
    prompt = tuple(Text(text=part) if isinstance(part, str) else part for part in parts)
    return ask(next(name)).model_copy(update={"prompt": prompt, **settings})


def test_the_answer_depends_on_the_picture_alone(seer: Program) -> None:
    assert seer.capabilities is not None
    assert seer.capabilities.vision
    results = [one(seer, look(BEFORE, picture, AFTER)) for picture in (CAT, DOG, CAT)]
    cat, dog, again = (result.tokens for result in results)
    assert cat == again
    assert cat != dog


def test_the_place_of_a_picture_counts(seer: Program) -> None:
    first, second, swapped, both = (
        one(seer, look(*parts)).tokens
        for parts in ((CAT, BEFORE, AFTER), (BEFORE, CAT, AFTER), (DOG, CAT, AFTER), (CAT, DOG, AFTER))
    )
    assert len({tuple(each) for each in (first, second, swapped, both)}) == 4


def test_a_cached_picture_is_found_by_its_content(cutting_seer: Program) -> None:
    program, before = cutting_seer, f"{next(name)} {BEFORE}"  # nothing of it is cached
    first = one(program, look(before, CAT, AFTER)).finished.usage
    assert first.cached_tokens < n_tokens(program, before)
    again = one(program, look(before, CAT, AFTER)).finished.usage
    assert again.cached_tokens == again.prompt_tokens - 1
    longer = one(program, look(before, CAT, AFTER, " And then?")).finished.usage
    assert longer.cached_tokens >= first.prompt_tokens - 1
    other = one(program, look(before, DOG, AFTER)).finished.usage
    assert other.prompt_tokens - other.cached_tokens >= min(TOKENS.values()) + n_tokens(program, AFTER)


def test_what_is_cached_changes_no_answer(seer: Program) -> None:
    """A part of the prompt is in the cache: up to the picture, behind it, or behind another picture."""
    parts = (f"{next(name)} ", CAT, AFTER, DOG, "And this one?")
    alone = one(seer, look(*parts)).tokens
    one(seer, look(*parts[:3], "Something else follows here."))
    one(seer, look(parts[0], DOG, AFTER))
    assert one(seer, look(*parts)).tokens == alone


@pytest.mark.parametrize(("case", "kind"), [("whole", "gemma3"), ("causal", "mlp"), ("flat", "qwen2vl_merger")])
def test_usage_counts_the_tokens_of_a_picture(seers: Shared, case: str, kind: Kind) -> None:
    program = seers.program(SEEING[case])
    text, seen = (one(program, look(*parts)).finished.usage for parts in ((BEFORE, AFTER), (BEFORE, CAT, AFTER)))
    around = sum(n_tokens(program, mark) for mark in MARKS[kind])
    assert seen.prompt_tokens - text.prompt_tokens == TOKENS[kind] + around


@needs_vllm
def test_vllm_counts_the_tokens_of_a_picture_and_finds_its_blocks_by_their_content(seers: Shared) -> None:
    program, before = seers.program(VLLM), f"{next(name)} {BEFORE * 3}"
    text = one(program, look(before, AFTER)).finished.usage.prompt_tokens
    first, again, other = (one(program, look(before, each, AFTER * 3)).finished.usage for each in (CAT, CAT, DOG))
    assert one(program, look(before, CAT, AFTER)).finished.usage.prompt_tokens == text + FOLDER_TOKENS
    start = n_tokens(program, before)
    assert first.cached_tokens == other.cached_tokens == start // 32 * 32
    assert again.cached_tokens == (again.prompt_tokens - 1) // 32 * 32 > start + FOLDER_TOKENS


def test_a_picture_in_the_middle_of_a_replay_is_seen_again(seer: Program) -> None:
    goes_on_from_everywhere(seer, look(BEFORE, CAT, AFTER, max_tokens=6))


def test_company_changes_no_answer(seer: Program) -> None:
    requests = [
        look(BEFORE, CAT, AFTER),
        look("A text without any picture, which is longer than the others are. " * 3),
        look(DOG, AFTER),
        look(BEFORE, DOG, AFTER, CAT, "Which is larger?"),
    ]
    alone = [one(seer, each).tokens for each in requests]
    together = seer.generate(*(each.model_copy(update={"id": next(name)}) for each in requests * 2))
    assert [result.tokens for result in together] == alone * 2


def test_sequences_of_one_prompt_see_its_picture(seer: Program) -> None:
    request, siblings = look(f"{next(name)} ", CAT, AFTER), tuple(islice(name, 3))
    also = tuple(Sibling(id=each, seed=seed) for seed, each in enumerate(siblings, start=1))
    seer.send(request.model_copy(update={"also": also}))
    seer.until(seer.ended(request.id, *siblings))
    tokens = [seer.results[each].tokens for each in (request.id, *siblings)]
    assert tokens == [tokens[0]] * 4
    assert len(tokens[0]) == 16


def test_a_cancelled_picture_frees_the_slot(seer: Program) -> None:
    requests = [look(f"{next(name)} ", CAT, AFTER, max_tokens=None) for _ in range(4)]
    seer.send(*requests)
    for request in requests:
        seer.cancel(request.id)
    seer.until(seer.ended(*(request.id for request in requests)))
    assert all(seer.results[request.id].finished.reason == "cancelled" for request in requests)
    assert one(seer, look(BEFORE, CAT, AFTER)).finished.reason == "length"


def _wide(pixels: int) -> Picture:
    """A picture that says it has so many pixels, in a row."""
    png = random_png(1)
    return picture_of(png[:16] + pixels.to_bytes(4, "big") + (1).to_bytes(4, "big") + png[24:])


REFUSED: Mapping[str, tuple[tuple[str | Picture, ...], str]] = {
    "no base64": ((BEFORE, Picture(png="?"), AFTER), "picture 1: its PNG is not in base64"),
    "no PNG": ((BEFORE, picture_of(b"GIF89a"), AFTER), "picture 1: it is no PNG"),
    "truncated": ((BEFORE, CAT, picture_of(random_png(3)[:-200]), AFTER), "picture 2: its PNG is damaged"),
    "damaged": ((BEFORE, picture_of(random_png(3)[:40]), AFTER), "picture 1: its PNG is damaged"),
    "too large": ((BEFORE, _wide(PICTURE_PIXELS + 1), AFTER), "picture 1: it has 4194305 x 1 pixels; accepted are"),
    "too long": ((BEFORE, _wide(1000), AFTER), "picture 1: it has 1000 x 1 pixels; one side"),
    "without pixels": ((BEFORE, _wide(0), AFTER), "picture 1: it has 0 x 1 pixels"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_bad_picture_fails_its_own_request(seer: Program, fault: str) -> None:
    parts, reason = REFUSED[fault]
    good, bad = look(BEFORE, CAT, AFTER), look(*parts)
    alone = one(seer, good).tokens
    running, refused = seer.generate(good.model_copy(update={"id": next(name)}), bad)
    assert refused.failed.code == "invalid_request"
    assert refused.failed.param == "prompt"
    assert refused.failed.message.startswith(f"prompt: {reason}")
    assert running.tokens == alone


@pytest.mark.parametrize("case", ["causal", "pool"])
def test_text_must_follow_the_last_picture(seers: Shared, case: str) -> None:
    """Other projectors put a token behind each picture."""
    failed = one(seers.program(SEEING[case]), look(BEFORE, CAT)).failed
    assert failed.message == "prompt: picture 1: no text follows it, and a prompt must end with text"


def test_pictures_that_exceed_the_context_are_refused_with_their_tokens(seer: Program) -> None:
    failed = one(seer, look(*[CAT] * 50, AFTER)).failed
    assert failed.code == "context_length_exceeded"
    assert failed.prompt_tokens > 50 * min(TOKENS.values())
    assert failed.context_length == 512


def test_the_log_probabilities_of_a_picture_are_refused(seer: Program) -> None:
    failed = one(seer, look(BEFORE, CAT, AFTER, prompt_logprobs=0)).failed
    assert (failed.code, failed.param) == ("invalid_request", "prompt_logprobs")
    result = one(seer, look(BEFORE, CAT, AFTER, logprobs=1))
    assert len(result.logprobs) == len(result.tokens)


def test_only_a_prompt_to_generate_from_has_pictures(seer: Program) -> None:
    prompt = (Text(text=BEFORE), CAT)
    for result in seer.generate(Embed(id=next(name), prompt=prompt), Tokenize(id=next(name), prompt=prompt)):
        assert (result.failed.code, result.failed.param) == ("invalid_request", "prompt")


def test_a_model_that_sees_nothing_refuses_pictures(program: Program) -> None:
    assert program.capabilities is not None
    assert not program.capabilities.vision
    seen, read = program.generate(look(BEFORE, CAT, AFTER), look(BEFORE, AFTER))
    assert (seen.failed.code, seen.failed.param) == ("invalid_request", "prompt")
    assert seen.failed.message == "prompt: this model takes no pictures here"
    assert read.finished.reason in ("stop", "length")
