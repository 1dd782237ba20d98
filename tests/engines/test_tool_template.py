"""A template that is meant for requests with tools is used for those, whatever form the model has."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.convert import convert
from tests.support.edited_gguf import Edit, rewrite
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
WITH_TOOLS = "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}" + PLAIN
MODELS = ("gguf", "list", "files", "json", "converted")
TOOL: JsonValue = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}


def write_models(home: Path) -> None:
    write_gguf(home / "sound.gguf", Shape())
    keys = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": WITH_TOOLS}
    rewrite(home / "sound.gguf", home / "gguf.gguf", Edit(keys=keys))
    for name in ("list", "files", "json"):
        write_mlx(home / name, Shape())
        config = json.loads((home / name / "tokenizer_config.json").read_text())
        del config["chat_template"]
        if name == "list":
            both = {"default": PLAIN, "tool_use": WITH_TOOLS}
            config["chat_template"] = [{"name": each, "template": text} for each, text in both.items()]
        (home / name / "tokenizer_config.json").write_text(json.dumps(config))
    (home / "files" / "additional_chat_templates").mkdir()
    (home / "files" / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    (home / "files" / "chat_template.jinja").write_text(PLAIN)
    (home / "json" / "chat_template.json").write_text(json.dumps({"chat_template": WITH_TOOLS}))
    convert(home / "json", home / "converted.gguf", to="gguf", dtype="f32")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_models(home)
    for name in MODELS:
        runner, backend = ("mlx", "MlxCpu") if (home / name).is_dir() else ("cuda", "LlamaCppCpu")
        path = str(home / name) if runner == "mlx" else str(home / f"{name}.gguf")
        write_card(home, name, {runner: {"path": path, "n_ctx": 256, "slots": 1}}, backends=[backend])
    with ServeProgram(home) as program:
        yield program


@pytest.mark.parametrize("model", MODELS)
def test_a_request_with_tools_gets_the_template_for_tools(server: ServeProgram, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    with_tools = server.client.post("/apply-template", json={**body, "tools": [TOOL]})
    assert with_tools.status_code == 200, with_tools.text
    assert with_tools.json()["prompt"] == "[paint]hi"
    assert server.client.post("/apply-template", json=body).json()["prompt"] == "hi"
