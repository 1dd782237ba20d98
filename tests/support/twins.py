"""One tiny float32 model for both engines, and runners of both that compute with it as exactly as possible."""

from pathlib import Path

from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from tests.support.program import Program, runner_command
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.shape import Architecture

BACKENDS: list[JsonValue] = ["LlamaCppCpu", "MlxCpu"]
FLOAT32: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
"""Keys of ``[cuda]`` with which llama.cpp computes in float32, and in the same order each time."""


def write_twins(home: Path, shape: Shape | None = None, **settings: JsonValue) -> dict[str, dict[str, JsonValue]]:
    """The same weights for both engines, computed in float32. Returns the engine tables of their card."""
    shape = shape or Shape()
    write_gguf(home / "twin.gguf", shape)
    write_mlx(home / "twin", shape)
    sizes: dict[str, JsonValue] = {"n_ctx": 2048, "slots": 4, **settings}
    return {
        "cuda": {"path": str(home / "twin.gguf"), **FLOAT32, **sizes},
        "mlx": {"path": str(home / "twin"), "dtype": "float32", **sizes},
    }


class Models:
    """Twins, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mlx(self, architecture: Architecture) -> Path:
        path = self._folder / architecture
        if not path.exists():
            write_mlx(path, Shape(architecture))
        return path

    def gguf(self, architecture: Architecture) -> Path:
        path = self._folder / f"{architecture}.gguf"
        if not path.exists():
            write_gguf(path, Shape(architecture))
        return path


class Start:
    """Starts runners; ``stop`` ends them."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.running: list[Program] = []
        self._shared: dict[str, Program] = {}

    def mlx(self, path: Path, **table: JsonValue) -> Program:
        return self._program("mlx", mlx_load(path, **table))

    def shared(self, path: Path, **table: JsonValue) -> Program:
        """The runner of earlier tests with these settings, which all leave it as they found it."""
        key = mlx_load(path, **table).model_dump_json()
        if key not in self._shared or self._shared[key].process.poll() is not None:
            self._shared[key] = self.mlx(path, **table)
        return self._shared[key]

    def cuda(self, path: Path) -> Program:
        table = {**FLOAT32, "path": str(path)}
        return self._program("cuda", Load(model_id="test/tiny", backend="LlamaCppCpu", table=table))

    def _program(self, runner: str, load: Load) -> Program:
        program = Program(runner_command(RUNNERS[runner].module)).__enter__()
        self.running.append(program)
        program.load(load)
        return program

    def stop(self) -> None:
        for program in self.running:
            program.__exit__(None, None, None)


def mlx_load(path: Path, **table: JsonValue) -> Load:
    return Load(model_id="test/tiny", backend="MlxCpu", table={"path": str(path), "dtype": "float32", **table})
