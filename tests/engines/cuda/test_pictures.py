"""Pictures in prompts with llama.cpp: other processes, guesses, the disk, streams beside them, broken projectors."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Generate, Load, Picture, Text
from exo.worker.protocol.events import Failed
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_cuda.speculation.ngram_drafter import Drafter
from tests.support.edited_gguf import Edit, rewrite
from tests.support.pictures import random_picture
from tests.support.program import Program, ask, names, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.gguf_file import write_flat_gguf
from tests.support.tiny.projector import Kind, Sizes, write_projector

CAT = random_picture(1)
Start = Callable[..., Program]
name = names()

FILES: dict[str, tuple[Kind, Callable[[Path], None]]] = {
    "whole": ("gemma3", lambda path: write_gguf(path, Shape())),
    "causal": ("mlp", lambda path: write_gguf(path, Shape())),
    "flat": ("qwen2vl_merger", write_flat_gguf),
}


@pytest.fixture(params=FILES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, write = FILES[request.param]
    write(tmp_path / "tiny.gguf")
    write_projector(tmp_path / "mmproj.gguf", kind, 64)
    return tmp_path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    return tmp_path


def load(folder: Path, **more: JsonValue) -> Load:
    kinds = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    table = {"path": str(folder / "tiny.gguf"), "mmproj": "mmproj.gguf", "threads": 1, "n_ctx": 4096, "slots": 2}
    return Load(model_id="test/tiny", backend="LlamaCppCpu", table={**table, **kinds, **more})


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def start(folder: Path, prefixes: str = "", **more: JsonValue) -> Program:
            program = stack.enter_context(Program(runner_command(RUNNERS["cuda"].module)))
            program.load(load(folder, **more).model_copy(update={"prefixes": prefixes}))
            return program

        yield start


def look(*parts: str | Picture, **settings: object) -> Generate:
    prompt = tuple(Text(text=part) if isinstance(part, str) else part for part in parts)
    return ask(next(name)).model_copy(update={"prompt": prompt, **settings})


def test_another_process_goes_on_after_a_kill(folder: Path, start: Start) -> None:
    request = look("Here is a picture: ", CAT, "What does it show?", max_tokens=40)
    first, second = start(folder), start(folder)
    (whole,) = second.generate(request)
    first.send(request)
    first.until(lambda: request.id in first.results and len(first.results[request.id].tokens) >= 3)
    first.process.send_signal(signal.SIGKILL)
    delivered = tuple(first.results[request.id].tokens)
    (rest,) = second.generate(request.model_copy(update={"id": next(name), "delivered": delivered}))
    assert [*delivered, *rest.tokens] == whole.tokens


def test_guesses_change_no_answer(folder: Path, start: Start) -> None:
    """The prompt repeats itself, also across the picture, so that there is something to guess."""
    parts = (*("He said that it rains. ", CAT) * 3, "He said that it rains. He said")
    write_gguf(folder / "draft.gguf", Shape(seed=1))
    (usual,) = start(folder).generate(look(*parts, max_tokens=60))
    (looked_up,) = start(folder, speculate=4).generate(look(*parts, max_tokens=60))
    (drafted,) = start(folder, speculate=4, draft={"path": str(folder / "draft.gguf")}).generate(
        look(*parts, max_tokens=60)
    )
    assert looked_up.tokens == drafted.tokens == usual.tokens


def test_a_token_of_a_picture_is_no_guess() -> None:
    tokens = [1, 2, 3, 4, -7, -8, 5, 1, 2, 3]
    drafter = Drafter(0)
    drafter.follow(tokens)
    assert drafter.draft(tokens, 4) == [4, 4, 4, 4]
    drafter.follow([*tokens, 4])
    assert drafter.draft([*tokens, 4], 4) == []


def test_a_computed_picture_outlasts_the_runner_on_disk(folder: Path, start: Start, tmp_path: Path) -> None:
    parts = ("Here is a long story. " * 40, CAT, "What does the picture show? " * 20)
    first = start(folder, prefixes=str(tmp_path / "prefixes"))
    (whole,) = first.generate(look(*parts))
    assert first.shutdown() == 0
    second = start(folder, prefixes=str(tmp_path / "prefixes"))
    (again,) = second.generate(look(*parts))
    assert again.tokens == whole.tokens
    assert again.finished.usage.cached_tokens == again.finished.usage.prompt_tokens - 1
    (other,) = second.generate(look(parts[0], random_picture(2), parts[2]))
    assert other.tokens != whole.tokens


def test_streams_go_on_while_a_picture_is_encoded(plain: Path, start: Start) -> None:
    """The picture takes some 50 billion operations to encode, and a token of the stream some 100,000.

    The text before the picture has been computed, and no token of it is, before its encoding has ended.
    """
    write_projector(
        plain / "mmproj.gguf", "mlp", 64, Sizes(side=448, patch=14, width=1024, feed_forward=4096, heads=16)
    )
    program = start(plain, n_ctx=8192)
    stream, seen = ask(next(name), max_tokens=None), look("A picture: ", CAT, "What is it?")

    def n_streamed() -> int:
        return len(program.results[stream.id].tokens) if stream.id in program.results else 0

    program.send(stream)
    program.until(lambda: n_streamed() > 0)
    program.send(seen)
    program.until(lambda: seen.id in program.results and program.results[seen.id].prefill[-1].processed > 0)
    text, before = program.results[seen.id].prefill[-1].processed, n_streamed()
    assert text < 64
    program.until(lambda: program.results[seen.id].prefill[-1].processed > text)
    assert n_streamed() >= before + 5
    program.cancel(stream.id)
    program.until(program.ended(stream.id, seen.id))
    assert program.results[seen.id].finished.reason == "length"


def test_a_picture_that_is_computed_whole_needs_room(plain: Path, start: Start) -> None:
    write_projector(plain / "mmproj.gguf", "gemma3", 64, Sizes(merged=1))
    (refused,) = start(plain, n_ubatch=32).generate(look("A picture: ", CAT, "What is it?"))
    assert refused.failed.code == "invalid_request"
    assert "picture 1: its 64 tokens are computed in one step, which has at most 32" in refused.failed.message
    (seen,) = start(plain, n_ubatch=64).generate(look("A picture: ", CAT, "What is it?"))
    assert seen.finished.reason == "length"


def test_the_library_for_pictures_is_loaded_for_a_card_with_a_projector_only(plain: Path, start: Start) -> None:
    write_projector(plain / "mmproj.gguf", "mlp", 64)
    seeing, blind = start(plain), start(plain, mmproj=None)
    if Path("/proc/self/maps").exists():
        loaded = ["libmtmd" in Path(f"/proc/{each.process.pid}/maps").read_text() for each in (seeing, blind)]
        assert loaded == [True, False]
    failed = blind.generate(look("A picture: ", CAT, "What is it?"))[0].failed
    assert failed.message == "prompt: this model takes no pictures here"


def test_a_projector_in_ram_sees_the_same_beside_a_model_on_a_device(plain: Path) -> None:
    write_projector(plain / "mmproj.gguf", "mlp", 64)
    answers: list[list[int]] = []
    for offload in (True, False):
        with Program(llama_command("LlamaCppCuda")) as program:
            program.load(load(plain, mmproj_offload=offload).model_copy(update={"backend": "LlamaCppCuda"}))
            (result,) = program.generate(look("A picture: ", CAT, "What is it?"))
            answers.append(result.tokens)
    assert answers[0] == answers[1]


def failure(folder: Path) -> Failed:
    with Program(runner_command(RUNNERS["cuda"].module)) as program:
        program.send(load(folder))
        program.drain()
        assert program.failure is not None
        return program.failure


def test_a_missing_projector_is_named(plain: Path) -> None:
    failed = failure(plain)
    assert failed.code == "model_not_found"
    assert failed.message.startswith("model card, [cuda] mmproj: there is no projector mmproj.gguf beside")


def truncated(path: Path) -> None:
    write_projector(path, "mlp", 64)
    path.write_bytes(path.read_bytes()[:3000])


def of_type(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_projector(path.with_suffix(".sound"), "mlp", 64)
        rewrite(path.with_suffix(".sound"), path, Edit(keys={"clip.projector_type": kind}))

    return write


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a language model": (lambda path: write_gguf(path, Shape()), "it is no projector for pictures"),
    "another model's": (lambda path: write_projector(path, "mlp", 32), "mismatch between text model"),
    "large patches": (lambda path: write_projector(path, "qwen2vl_merger", 64, Sizes(patch=128)), "larger than the"),
    "a type that needs the whole prompt": (
        of_type("deepseek4v"),
        "is a projector of type 'deepseek4v': those make more",
    ),
    "a type of a later llama.cpp": (of_type("new"), "is a projector of type 'new', which is unknown to this llama.cpp"),
    "without a type": (of_type(""), "is a projector of type '', which is unknown"),
    "truncated": (truncated, ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_projector_is_refused(plain: Path, fault: str) -> None:
    write, reason = BROKEN[fault]
    write(plain / "mmproj.gguf")
    failed = failure(plain)
    assert failed.code == "model_load_failed"
    assert str(plain / "mmproj.gguf") in failed.message
    assert reason in failed.message
