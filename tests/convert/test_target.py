"""A target appears whole or not at all, whatever happens on the way."""

import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from exo.convert import ConversionProgress, ConvertError, Format, convert
from tests.support.converted import bits, make_twins, weights
from tests.support.edited_gguf import decoded
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.tokenizer import Tokenizer

PROGRAM = """
import resource, sys
from pathlib import Path
from exo.convert import convert

def step(progress):
    print(progress.done_bytes / progress.total_bytes, flush=True)
    sys.stdin.readline()

source, target, form, limit = sys.argv[1:]
if limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
convert(Path(source), Path(target), to=form, dtype="f32", overwrite=True, on_progress=step)
"""


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twins(tmp_path_factory.mktemp("twins"))


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion of a gemma3 twin into a target beside which nothing else is."""

    source: Path
    target: Path
    form: Format

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    def put_old(self) -> None:
        """An older model at the target."""
        if self.form == "mlx":
            write_mlx(self.target, Shape("gemma3", seed=7))
        else:
            write_gguf(self.target, Shape("gemma3", seed=7))

    def content(self, path: Path | None = None) -> dict[str, tuple[object, ...]]:
        path = path or self.target
        return bits(weights(path) if path.is_dir() else decoded(path))

    def run(self, *, overwrite: bool = False) -> None:
        convert(self.source, self.target, to=self.form, dtype="f32", overwrite=overwrite)


@pytest.fixture(params=["mlx", "gguf"])
def job(twins: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    if request.param == "mlx":
        return Job(twins / "gemma3.gguf", tmp_path / "model", "mlx")
    return Job(twins / "gemma3", tmp_path / "model.gguf", "gguf")


@contextmanager
def half_done(job: Job, limit: int = 0) -> Generator[subprocess.Popen[str]]:
    """A process that has written half of the target and waits."""
    command = [sys.executable, "-c", PROGRAM, str(job.source), str(job.target), job.form, str(limit)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if float(line) >= 0.5:
                break
            process.stdin.write("\n")
            process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(job: Job, twins: Path) -> None:
    with half_done(job) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not job.target.exists()
    assert list(job.target.parent.iterdir()) == [job.partial]
    job.run()
    assert list(job.target.parent.iterdir()) == [job.target]
    assert job.content() == job.content(twins / ("gemma3" if job.form == "mlx" else "gemma3.gguf"))


def test_a_killed_conversion_leaves_the_target_it_would_have_replaced(job: Job) -> None:
    job.put_old()
    old = job.content()
    with half_done(job) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert job.content() == old
    job.run(overwrite=True)
    assert job.content() != old
    assert list(job.target.parent.iterdir()) == [job.target]


def test_an_interrupted_conversion_clears_up_itself(job: Job) -> None:
    with half_done(job) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert list(job.target.parent.iterdir()) == []


def test_a_failing_disk_leaves_nothing(job: Job) -> None:
    with half_done(job, limit=700_000) as process:
        _, errors = process.communicate("\n" * 1000)
    assert "File too large" in errors.splitlines()[-1]
    assert list(job.target.parent.iterdir()) == []


def test_two_conversions_to_one_target(job: Job) -> None:
    with half_done(job):
        with pytest.raises(ConvertError, match=rf"^{job.target}: another conversion is writing it$"):
            job.run()
        assert not job.target.exists()
    job.run()
    assert list(job.target.parent.iterdir()) == [job.target]


def test_a_caller_that_fails_leaves_nothing(job: Job) -> None:
    def fail(progress: ConversionProgress) -> None:
        raise RuntimeError(progress.tensor)

    with pytest.raises(RuntimeError):
        convert(job.source, job.target, to=job.form, on_progress=fail)
    assert list(job.target.parent.iterdir()) == []


def test_a_target_that_exists_is_kept_unless_it_may_be_overwritten(job: Job) -> None:
    job.put_old()
    old = job.content()
    with pytest.raises(ConvertError, match=rf"^{job.target}: exists already; give another name, or ask"):
        job.run()
    assert job.content() == old
    job.run(overwrite=True)
    assert job.content() != old
    assert list(job.target.parent.iterdir()) == [job.target]


def test_a_folder_that_a_killed_conversion_had_moved_aside_comes_back(twins: Path, tmp_path: Path) -> None:
    """Between the two renames of an overwritten folder there is none; the next conversion sees to it first."""
    job = Job(twins / "gemma3.gguf", tmp_path / "model", "mlx")
    job.put_old()
    old = job.content()
    job.partial.mkdir()
    job.target.rename(job.partial / "old")
    with pytest.raises(ConvertError, match="exists already"):
        job.run()
    assert job.content() == old
    assert list(tmp_path.iterdir()) == [job.target]


def test_only_a_model_is_overwritten(job: Job) -> None:
    expected = "exists and is no such model; it is not overwritten"
    job.target.mkdir()
    (job.target / "letter.txt").write_text("dear")
    with pytest.raises(ConvertError, match=expected):
        job.run(overwrite=True)
    assert (job.target / "letter.txt").read_text() == "dear"
    shutil.rmtree(job.target)
    job.put_old()
    elsewhere = job.target.rename(job.target.with_name(f"elsewhere{job.target.suffix}"))
    job.target.symlink_to(elsewhere)
    with pytest.raises(ConvertError, match=expected):
        job.run(overwrite=True)
    assert job.target.readlink() == elsewhere


@pytest.mark.parametrize(
    ("target", "form", "message"),
    [
        ("model", "gguf", "expected a name ending in .gguf for the GGUF file"),
        ("model.gguf", "mlx", "expected the name of a folder, as an MLX model is one"),
    ],
)
def test_names_that_do_not_suit_the_format(
    twins: Path, tmp_path: Path, target: str, form: Format, message: str
) -> None:
    source = twins / ("llama" if form == "gguf" else "llama.gguf")
    with pytest.raises(ConvertError, match=rf"^{tmp_path / target}: {message}$"):
        convert(source, tmp_path / target, to=form)


def test_a_source_is_not_overwritten_by_what_is_made_of_it(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    write_gguf(tmp_path / "model" / "m.gguf", Shape())
    with pytest.raises(ConvertError, match=r"model: is or holds the source$"):
        convert(tmp_path / "model" / "m.gguf", tmp_path / "model", to="mlx", overwrite=True)
    convert(tmp_path / "model", tmp_path / "model" / "m.gguf", to="gguf", dtype="f32", overwrite=True)
    assert bits(decoded(tmp_path / "model" / "m.gguf"))


def test_missing_folders_above_the_target_are_made(twins: Path, tmp_path: Path) -> None:
    convert(twins / "llama.gguf", tmp_path / "a" / "b" / "model", to="mlx")
    assert (tmp_path / "a" / "b" / "model" / "config.json").is_file()


def test_a_disk_without_room_is_noticed_first(tmp_path: Path) -> None:
    """The model's 8 TB are a hole in a file."""
    hidden, vocabulary = 1 << 30, 2000
    tokenizer = Tokenizer.of_size(vocabulary)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    sizes = {"context_length": 64, "embedding_length": hidden, "feed_forward_length": 2, "block_count": 1}
    sizes |= {"attention.head_count": 1, "attention.key_length": 2, "attention.value_length": 2}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token.text for token in tokenizer.tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.0.{name}": (2, hidden) for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
    shapes |= {f"blk.0.{name}": (hidden, 2) for name in ("attn_output", "ffn_down")}
    shapes |= {f"blk.0.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.truncate(4 * sum(map(math.prod, shapes.values())) + 1_000_000)
    with pytest.raises(ConvertError, match=r"out: needs 8,\d{3}\.\d\d GB of disk, but [\d,.]+ GB is free$"):
        convert(tmp_path / "model.gguf", tmp_path / "out", to="mlx", dtype="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
