"""Models as other programs keep them. Hugging Face's cache is filled by its own library, the others as documented."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from exo.config import OtherFolders
from tests.support.hub import REPO, LocalHub
from tests.support.server import inherited

_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:] or None))
"""


def download(cache: Path, hub: LocalHub, *patterns: str, repo: str = REPO) -> Path:
    """Has huggingface_hub download the newest commit's files into its cache; returns the snapshot."""
    done = subprocess.run(
        [sys.executable, "-c", _DOWNLOAD, repo, *patterns],
        env={**inherited(), "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


class Ollama:
    """A folder of Ollama's, in the layout of its versions since 0.1.30."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True)

    def layer(self, kind: str, content: bytes | Path) -> dict[str, JsonValue]:
        """Adds a blob and returns the layer that a manifest names it by."""
        data = content.read_bytes() if isinstance(content, Path) else content
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / f"sha256-{digest}").write_bytes(data)
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    def blob(self, layer: Mapping[str, JsonValue]) -> Path:
        """The file of a layer."""
        return self.blobs / str(layer["digest"]).replace(":", "-")

    def manifest(self, name: str, *layers: dict[str, JsonValue], host: str = "registry.ollama.ai") -> Path:
        """Writes the manifest of ``namespace/model:tag``."""
        place, _, tag = name.partition(":")
        path = self.root / "manifests" / host / place / tag
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        config = self.layer("config", json.dumps({"model_format": "gguf", "file_type": "F32"}).encode())
        content = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}
        path.write_text(json.dumps(content))
        return path

    def model(self, name: str, gguf: Path, parameters: Mapping[str, JsonValue] | None = None) -> Path:
        """Adds a model as ``ollama pull`` leaves it; returns its manifest."""
        layers = [self.layer("model", gguf), self.layer("template", b"{{ .Prompt }}"), self.layer("license", b"MIT")]
        if parameters is not None:
            layers.append(self.layer("params", json.dumps(parameters).encode()))
        return self.manifest(name, *layers)


def put(file: Path, source: Path) -> Path:
    """Copies a file or a folder to where a program would have put it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, file)
    else:
        shutil.copyfile(source, file)
    return file


def folders(home: Path) -> OtherFolders:
    """The folders of all programs below one directory."""
    return OtherFolders(
        huggingface=(home / "hub",),
        ollama=(home / "ollama",),
        lmstudio=(home / "lmstudio",),
        llamacpp=(home / "llama.cpp",),
        further=(home / "further",),
    )


def variables(home: Path) -> dict[str, str]:
    """The environment in which exo looks there, and nowhere else on a machine without a system-wide Ollama."""
    user = home / "user"
    (user / ".lmstudio").mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (user / ".lmstudio" / "models").symlink_to(home / "lmstudio")
    return {
        "HOME": str(user),
        "EXO_FIND_MODELS": "1",
        "EXO_FIND_MODELS_IN": str(home / "further"),
        "HF_HUB_CACHE": str(home / "hub"),
        "OLLAMA_MODELS": str(home / "ollama"),
        "LLAMA_CACHE": str(home / "llama.cpp"),
    }
