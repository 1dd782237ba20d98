"""Prefixes on disk outlast the runner, never change a token, and harm nothing when they are damaged or too large."""

import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from tests.support.program import DEADLINE_SECONDS, Program, ask, names, runner_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.hybrid import write_hybrid
from tests.support.tiny.tokenizer import END_OF_TURN, Tokenizer
from tests.support.twins import FLOAT32

END = Tokenizer.of_size(320).id_of(END_OF_TURN)
WRITE: dict[str, Callable[[Path], None]] = {
    "plain": lambda path: write_gguf(path, Shape()),
    "window of 24": lambda path: write_gguf(path, Shape(architecture="gemma3", sliding_window=24)),
    "recurrent": write_hybrid,
}
Start = Callable[..., Program]


@pytest.fixture(params=WRITE)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    WRITE[request.param](tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    WRITE["plain"](tmp_path / "plain.gguf")
    return tmp_path / "plain.gguf"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a runner with a model; ``kept`` is whether it keeps prefixes on disk."""
    with ExitStack() as stack:

        def start(path: Path, *, kept: bool = True, name: str = "test/tiny", **more: JsonValue) -> Program:
            table = {**FLOAT32, "n_ctx": 4096}
            program = stack.enter_context(Program(runner_command(RUNNERS["cuda"].module)))
            table |= {"path": str(path), "slots": 2, **more}
            prefixes = str(tmp_path / "prefixes") if kept else ""
            program.load(Load(model_id=name, backend="LlamaCppCpu", table=table, prefixes=prefixes))
            return program

        yield start


def message(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [*(dice.randrange(97, 123) for _ in range(length)), END]


def answer(program: Program, prompt: list[int], length: int = 40) -> tuple[list[int], int]:
    """The tokens that follow, and how many of the prompt's were cached."""
    (result,) = program.generate(ask(next(names()), prompt, max_tokens=length))
    return result.tokens, result.finished.usage.cached_tokens


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "prefixes").glob("*/*/*"), key=lambda path: path.stat().st_mtime)


def until(done: Callable[[], object]) -> None:
    """Waits for what a runner does in the background."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def stored(program: Program, tmp_path: Path, prompt: list[int]) -> Path:
    """Has a prompt computed and written, and returns the file."""
    before = set(files(tmp_path))
    answer(program, prompt)
    until(lambda: [each for each in files(tmp_path) if each not in before and each.suffix == ".prefix"])
    (found,) = set(files(tmp_path)) - before
    return found


@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_a_conversation_goes_on_in_another_runner(end: str, model: Path, tmp_path: Path, start: Start) -> None:
    first, cold = start(model), start(model, kept=False, slots=1, prefix_cache_bytes=0, swa_full=True)
    prompt = message(0, 1500)
    reply, _ = answer(first, prompt)
    if end == "shutdown":
        assert first.shutdown() == 0
    else:
        until(lambda: [each for each in files(tmp_path) if each.suffix == ".prefix"])
        first.process.kill()
    (file,) = files(tmp_path)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (file, tmp_path / "prefixes")]
    assert modes == [0o600, 0o700]
    second = start(model)
    extended = [*prompt, *reply, END, *message(1, 100)]
    tokens, cached = answer(second, extended)
    assert cached == len(prompt) + len(reply) - 1
    assert tokens == answer(cold, extended)[0]


def test_a_reply_without_its_reasoning_goes_on_from_a_checkpoint_in_the_file(
    model: Path, tmp_path: Path, start: Start
) -> None:
    first, cold = start(model), start(model, kept=False, slots=1, prefix_cache_bytes=0, swa_full=True)
    prompt = message(0, 1500)
    reply, _ = answer(first, prompt, 80)
    first.shutdown()
    second = start(model)
    changed = [*prompt, *reply[40:], END, *message(1, 100)]
    tokens, cached = answer(second, changed)
    assert len(prompt) - 64 <= cached <= len(prompt)
    assert tokens == answer(cold, changed)[0]


def test_a_conversation_is_written_again_only_when_it_has_grown(plain: Path, tmp_path: Path, start: Start) -> None:
    program = start(plain)
    prompt = message(0, 2000)
    old = stored(program, tmp_path, prompt)
    answer(program, [*prompt, *message(1, 100)])
    other = stored(program, tmp_path, message(2, 1500))
    assert set(files(tmp_path)) == {old, other}
    grown = [*prompt, *message(1, 100), *message(3, 300)]
    answer(program, grown)
    until(lambda: not old.exists())
    program.shutdown()
    second = start(plain)
    assert answer(second, [*grown, 97])[1] >= len(grown)


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "text", "foreign"])
def test_a_file_that_is_not_as_it_was_written_is_not_used_and_deleted(
    damage: str, plain: Path, tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    first = start(plain)
    prompt = message(0, 1500)
    file = stored(first, tmp_path, prompt)
    first.process.kill()
    content = bytearray(file.read_bytes())
    match damage:
        case "byte":
            content[len(content) // 2] ^= 1
        case "cut":
            del content[-100:]
        case "empty":
            content.clear()
        case "text":
            content[:] = b"exo prefix 1\n\xff\xff\xff\xff{}"
        case _:
            other = start(plain, cache_type_k="f16")
            content[:] = stored(other, tmp_path, prompt).read_bytes()
    file.write_bytes(content)
    cold = start(plain, kept=False)
    second = start(plain)
    tokens, cached = answer(second, prompt)
    assert (tokens, cached) == answer(cold, prompt)
    assert cached == 0
    assert f"{file} " in capfd.readouterr().err


@pytest.mark.parametrize("change", [{"cache_type_k": "f16"}, {"flash_attn": "on"}, {}])
def test_states_of_other_settings_or_another_file_are_not_used(
    change: dict[str, JsonValue], plain: Path, tmp_path: Path, start: Start
) -> None:
    first = start(plain)
    prompt = message(0, 1500)
    file = stored(first, tmp_path, prompt)
    if not change:
        write_gguf(plain, Shape(seed=1))
    second = start(plain, **change)
    assert answer(second, prompt)[1] == 0
    assert file.exists()


def test_the_least_recently_used_files_of_all_models_are_evicted(plain: Path, tmp_path: Path, start: Start) -> None:
    one, two = start(plain, name="test/one"), start(plain, name="test/two")
    size = stored(one, tmp_path, message(0, 1500)).stat().st_size
    one.shutdown()
    one = start(plain, name="test/one", prefix_disk_bytes=3 * size + size // 2)
    first, second = stored(one, tmp_path, message(1, 1500)), stored(two, tmp_path, message(2, 1500))
    two.shutdown()
    two = start(plain, name="test/two", prefix_disk_bytes=3 * size + size // 2)
    oldest = files(tmp_path)[0]
    os.utime(first)
    fourth = stored(two, tmp_path, message(3, 1500))
    assert set(files(tmp_path)) == {first, second, fourth}
    assert not oldest.exists()
    off = start(plain, name="test/one", prefix_disk_bytes=0)
    assert answer(off, message(1, 1500))[1] == 0


def test_runners_that_share_a_folder_use_what_the_others_write(plain: Path, tmp_path: Path, start: Start) -> None:
    one, two = start(plain), start(plain)
    stored(one, tmp_path, message(0, 1500))
    assert answer(two, message(0, 1500))[1] == 1500
    for seed in range(1, 5):
        for program in one, two:
            program.send(ask(f"{seed}", message(seed % 3, 1500), max_tokens=4))
    for program in one, two:
        program.until(program.ended(*"1234"))
        assert program.shutdown() == 0
    third = start(plain)
    assert [answer(third, message(seed, 1500))[1] for seed in range(3)] == [1500] * 3


def test_a_folder_that_cannot_be_written_is_told_once(
    plain: Path, tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prefixes").touch()
    program = start(plain)
    told, said = "prefixes are not kept on disk", list[str]()

    def is_told() -> bool:
        said.append(capfd.readouterr().err)
        return told in "".join(said)

    answer(program, message(0, 1500))
    until(is_told)
    answer(program, message(1, 1500))
    assert program.shutdown() == 0  # another occasion to write
    is_told()
    assert "".join(said).count(told) == 1


def test_a_folder_of_another_user_is_neither_read_nor_written(
    plain: Path, tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    first = start(plain)
    stored(first, tmp_path, message(0, 1500))
    os.chown(tmp_path / "prefixes", 4901, 4901)
    second = start(plain)
    assert answer(second, message(0, 1500))[1] == 0
    answer(second, message(1, 1500))
    assert second.shutdown() == 0
    assert len(files(tmp_path)) == 1
    assert "cannot be read or belongs to another user" in capfd.readouterr().err
