"""Models in Ollama's folder.

    manifests/<host>/<namespace>/<model>/<tag>     a manifest: JSON that names the layers of a model by digest
    blobs/sha256-<digest>                          a layer: a GGUF file, a template, parameters, a licence

A model's template is a program in Go, which exo does not use: the GGUF file has the template of the model's author.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import from_json

from exo.cards.card import SamplingDefaults
from exo.store.found.look import Look
from exo.store.found.unread_model import UnreadModel, UnusableError, reason_of
from exo.worker.protocol.wire import describe

PROGRAM = "Ollama"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
"""Parts of a name that Ollama leaves out."""
_JSON_LIMIT = 1 << 20
_KIND = "application/vnd.ollama.image."
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""exo's names of Ollama's parameters. The others set what exo decides itself, such as num_ctx."""
_WHOLE = {"top_k"}


class _OllamaLayer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str = Field(alias="mediaType")
    digest: Annotated[str, Field(pattern="^sha256[:-][0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class _OllamaManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    config: _OllamaLayer | None = None
    layers: tuple[_OllamaLayer, ...]

    def layers_of(self, kind: str) -> list[_OllamaLayer]:
        return [layer for layer in self.layers if layer.kind.partition(";")[0].strip() == _KIND + kind]


class _OllamaConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    file_type: str = ""


def ollama_models(root: Path, look: Look) -> Iterator[UnreadModel | UnusableError]:
    """Every model with a manifest below ``root``."""
    manifests = root / "manifests"
    for folder, names in look.walk(manifests, 3):
        if isinstance(names, OSError):
            yield UnusableError(folder, reason_of(names))
            continue
        parts = folder.relative_to(manifests).parts
        if len(parts) == 3:
            for tag in names:
                if not tag.startswith("."):
                    yield _model(root, look, folder / tag, (*parts, tag))


def _model(root: Path, look: Look, path: Path, name: tuple[str, ...]) -> UnreadModel | UnusableError:
    host, namespace, model, tag = name
    places = [each for each, usual in ((host, _HOST), (namespace, _NAMESPACE)) if each != usual or host != _HOST]
    own_name = "/".join((*places, model)) + f":{tag}"
    try:
        manifest = _OllamaManifest.model_validate_json(look.read(path, _JSON_LIMIT))
        weights = manifest.layers_of("model")
        if len(weights) != 1:
            return UnusableError(path, f"has {len(weights)} layers of GGUF weights; exo loads a model of one")
        if manifest.layers_of("adapter"):
            return UnusableError(path, "has an adapter (LoRA), which exo does not apply to models of Ollama")
        blob = _blob(root, look, weights[0])
        parameters = _parameters(root, look, manifest)
    except ValidationError as error:
        return UnusableError(path, f"is no manifest of Ollama: {describe(error)[1]}")
    except (OSError, ValueError) as error:
        return UnusableError(path, reason_of(error))
    sampling, ignored = _sampling(parameters)
    ignored += [kind for kind in ("system", "messages") if manifest.layers_of(kind)]
    short = {model, f"{model}:{tag}"} if tag == _TAG else {f"{model}:{tag}"}
    return UnreadModel(
        name=f"ollama/{own_name}",
        path=blob,
        size=weights[0].size,
        program=PROGRAM,
        removal=f"`ollama rm {own_name}` deletes it",
        quantization=_quantization(root, look, manifest),
        aliases=() if places else tuple(sorted(short)),
        sampling=sampling,
        notes=(f"set in Ollama and not used: {', '.join(ignored)}",) if ignored else (),
    )


def _path(root: Path, look: Look, layer: _OllamaLayer) -> tuple[Path, int | None]:
    """The blob of a layer and its size. Older versions of Ollama have put a colon into the name."""
    digest = layer.digest.replace(":", "-")
    path = root / "blobs" / digest
    if (size := look.size(path)) is None:
        older = root / "blobs" / digest.replace("-", ":")
        if (older_size := look.size(older)) is not None:
            return older, older_size
    return path, size


def _blob(root: Path, look: Look, layer: _OllamaLayer) -> Path:
    """Raises ValueError if the blob is not there as a whole, and OSError if it cannot be looked at."""
    path, size = _path(root, look, layer)
    if size is None:
        try:
            path.stat()
        except FileNotFoundError:
            raise ValueError(f"names the blob {path}, which is not there") from None
        raise ValueError(f"names the blob {path}, which is not a regular file")
    if size != layer.size:
        raise ValueError(f"names the blob {path}, of which {size:,} of {layer.size:,} bytes are there")
    return path


def _parameters(root: Path, look: Look, manifest: _OllamaManifest) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for layer in manifest.layers_of("params"):
        path, _ = _path(root, look, layer)
        content = from_json(look.read(path, _JSON_LIMIT))
        if not isinstance(content, dict):
            raise ValueError(f"has parameters that are no JSON object, in {path}")
        found |= content
    return found


def _sampling(parameters: dict[str, JsonValue]) -> tuple[SamplingDefaults, list[str]]:
    """The default sampling parameters, and the names of those parameters that have no effect."""
    given: dict[str, float] = {}
    ignored: list[str] = []
    for name, value in parameters.items():
        own = _SAMPLING.get(name)
        if own is None or isinstance(value, bool) or not isinstance(value, int | float):
            ignored.append(name)
            continue
        number = int(value) if name in _WHOLE else value
        try:
            SamplingDefaults.model_validate({own: number})
        except ValidationError:
            ignored.append(name)
        else:
            given[own] = number
    return SamplingDefaults.model_validate(given), ignored


def _quantization(root: Path, look: Look, manifest: _OllamaManifest) -> str:
    if manifest.config is None:
        return ""
    path, _ = _path(root, look, manifest.config)
    try:
        return re.sub(r"[^A-Za-z0-9_]", "", _OllamaConfig.model_validate_json(look.read(path, _JSON_LIMIT)).file_type)[
            :20
        ]
    except (OSError, ValueError):
        return ""  # it is for lists only
