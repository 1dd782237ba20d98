"""The check of a GGUF header as the runner makes it, in a sandbox: sound files pass, the rest is refused by name."""

from pathlib import Path

import pytest

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.gguf_check import check_header
from tests.support.edited_gguf import Edit, rewrite
from tests.support.tiny import Shape, write_gguf


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path, Shape())
    return path


def test_a_sound_file_passes(sound: Path) -> None:
    check_header(sound)


@pytest.mark.parametrize(("content", "says"), [(b"", "ends within its header, at byte 0"), (b"GGML", "b'GGML'")])
def test_a_refusal_names_the_file_and_is_a_failed_load(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(LoadError) as refusal:
        check_header(path)
    assert refusal.value.code == "model_load_failed"
    assert str(refusal.value).startswith(f"{path} cannot be loaded: it ")
    assert says in str(refusal.value)


def test_every_file_of_a_split_model_is_checked(sound: Path, tmp_path: Path) -> None:
    rewrite(sound, tmp_path / "m.gguf", Edit(part_size=10))
    first, second, *_ = sorted(tmp_path.glob("m-*.gguf"))
    check_header(first)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(LoadError, match=second.name):
        check_header(first)
    second.unlink()
    with pytest.raises(LoadError, match=f"{second.name} cannot be read"):
        check_header(first)


def test_the_check_runs_without_a_shell_and_without_the_command_pipe(sound: Path, tmp_path: Path) -> None:
    odd = tmp_path / "$(touch canary) \n-.gguf"
    odd.write_bytes(sound.read_bytes())
    check_header(odd)
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]


def test_a_file_without_an_end_runs_into_a_limit() -> None:
    with pytest.raises(LoadError, match="/dev/zero cannot be loaded: it ends within its header, at byte 0"):
        check_header(Path("/dev/zero"))
