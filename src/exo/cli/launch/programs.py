"""The programs that ``exo launch`` knows: what each is told about the server, and how.

None of this changes a file of the user. A program is told by its environment, its arguments, or files in a temporary
folder.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_KEY = "EXO_LAUNCH_KEY"
"""The environment variable from which programs read the server's key."""
_REPLY_SHARE = 4
"""A program is told that a reply takes at most this part of the context."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server and the model, as a program is told them. ``context`` are tokens of prompt and reply together."""

    url: str
    key: str
    model: str
    """The name that the user gave."""
    model_id: str
    """The name in the server's list of models."""
    context: int
    folder: Path
    """The temporary folder for the program's configuration."""

    @property
    def openai(self) -> str:
        """The address of the OpenAI-compatible API."""
        return f"{self.url}/v1"

    @property
    def reply(self) -> int:
        """The most tokens of a reply."""
        return min(32_000, self.context // _REPLY_SHARE)


Telling = Callable[[Target], Mapping[str, str]]
_NOTHING: Telling = lambda _: {}  # noqa: E731


@dataclass(frozen=True, slots=True)
class Program:
    """One program. ``command`` is its executable, ``install`` the command that installs it."""

    title: str
    command: str
    install: str
    first_prompt: int
    """About how many tokens its own part of the first prompt has: instructions and tools; 0 if it sends none."""
    environment: Telling = _NOTHING
    files: Telling = _NOTHING
    """The texts of the files in the temporary folder, by name."""
    arguments: Callable[[Target], list[str]] = lambda _: []


def _claude_environment(target: Target) -> Mapping[str, str]:
    models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("HAIKU", "SONNET", "OPUS")))
    return {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        **dict.fromkeys(models, target.model),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.reply),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _codex_arguments(target: Target) -> list[str]:
    provider = "model_providers.exo"
    settings: dict[str, str | int] = {
        "model": target.model,
        "model_provider": "exo",
        "model_context_window": target.context,
        f"{provider}.name": "exo",
        f"{provider}.base_url": target.openai,
        f"{provider}.env_key": _KEY,
        f"{provider}.wire_api": "responses",
    }
    return [part for name, value in settings.items() for part in ("-c", f"{name}={json.dumps(value)}")]


def _opencode_environment(target: Target) -> Mapping[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "exo",
        "options": {"baseURL": target.openai, "apiKey": target.key},
        "models": {target.model: {"name": target.model, "limit": {"context": target.context, "output": target.reply}}},
    }
    model = f"exo/{target.model}"
    config = {"model": model, "small_model": model, "provider": {"exo": provider}}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


def _qwen_environment(target: Target) -> Mapping[str, str]:
    return {_KEY: target.key, "QWEN_CODE_SYSTEM_SETTINGS_PATH": str(target.folder / "settings.json")}


def _qwen_files(target: Target) -> Mapping[str, str]:
    model = {
        "id": target.model,
        "name": target.model,
        "envKey": _KEY,
        "baseUrl": target.openai,
        "generationConfig": {"contextWindowSize": target.context, "samplingParams": {"max_tokens": target.reply}},
    }
    settings = {
        "modelProviders": {"openai": [model]},
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": target.model},
    }
    return {"settings.json": json.dumps(settings, indent=2)}


def _cline_files(target: Target) -> Mapping[str, str]:
    name = "openai-compatible"
    settings = {"provider": name, "apiKey": target.key, "model": target.model, "baseUrl": target.openai}
    providers = {
        "version": 1,
        "lastUsedProvider": name,
        "modes": {},
        "providers": {name: {"settings": settings, "updatedAt": "2026-01-01T00:00:00.000Z", "tokenSource": "manual"}},
    }
    limits = {"contextWindow": target.context, "maxTokens": target.reply}
    model = {"id": target.model, "name": target.model, **limits}
    provider = {"name": "exo", "baseUrl": target.openai, "defaultModelId": target.model}
    models = {"version": 1, "providers": {name: {"provider": provider, "models": {target.model: model}}}}
    return {
        "settings/providers.json": json.dumps(providers, indent=2),
        "settings/models.json": json.dumps(models, indent=2),
    }


def _pi_files(target: Target) -> Mapping[str, str]:
    model = {
        "id": target.model,
        "name": target.model,
        "reasoning": False,
        "input": ["text"],
        "cost": dict.fromkeys(("input", "output", "cacheRead", "cacheWrite"), 0),
        "contextWindow": target.context,
        "maxTokens": target.reply,
    }
    provider = {"baseUrl": target.openai, "apiKey": target.key, "api": "openai-completions", "models": [model]}
    return {"exo.js": f'export default (pi) => pi.registerProvider("exo", {json.dumps(provider, indent=2)});\n'}


def _aider_files(target: Target) -> Mapping[str, str]:
    limits = {
        "max_tokens": target.reply,
        "max_input_tokens": target.context,
        "max_output_tokens": target.reply,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    return {"models.json": json.dumps({f"openai/{target.model}": limits}, indent=2)}


def _open_webui_environment(target: Target) -> Mapping[str, str]:
    return {
        "OPENAI_API_BASE_URL": target.openai,
        "OPENAI_API_KEY": target.key,
        "ENABLE_OLLAMA_API": "false",
        "DEFAULT_MODELS": target.model_id,  # it accepts only names that it has found in the list
        "ENABLE_PERSISTENT_CONFIG": "false",
    }


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "claude": Program(
            "Claude Code", "claude", "npm install -g @anthropic-ai/claude-code", 20_000, environment=_claude_environment
        ),
        "codex": Program(
            "Codex",
            "codex",
            "npm install -g @openai/codex",
            10_000,
            environment=lambda target: {_KEY: target.key},
            arguments=_codex_arguments,
        ),
        "opencode": Program(
            "opencode", "opencode", "npm install -g opencode-ai", 8_000, environment=_opencode_environment
        ),
        "qwen": Program(
            "Qwen Code",
            "qwen",
            "npm install -g @qwen-code/qwen-code",
            20_000,
            environment=_qwen_environment,
            files=_qwen_files,
        ),
        "cline": Program(
            "Cline",
            "cline",
            "npm install -g cline",
            5_000,
            files=_cline_files,
            arguments=lambda target: ["--data-dir", str(target.folder), "-P", "openai-compatible", "-m", target.model],
        ),
        "pi": Program(
            "pi",
            "pi",
            "npm install -g @earendil-works/pi-coding-agent",
            1_500,
            files=_pi_files,
            arguments=lambda target: [
                *("--extension", str(target.folder / "exo.js")),
                *("--provider", "exo", "--model", target.model),
            ],
        ),
        "aider": Program(
            "aider",
            "aider",
            "pip install aider-chat",
            1_000,
            environment=lambda target: {"OPENAI_API_BASE": target.openai, "OPENAI_API_KEY": target.key},
            files=_aider_files,
            arguments=lambda target: [
                *("--model", f"openai/{target.model}"),
                *("--model-metadata-file", str(target.folder / "models.json")),
            ],
        ),
        "open-webui": Program(
            "Open WebUI",
            "open-webui",
            "pip install open-webui",
            0,
            environment=_open_webui_environment,
            arguments=lambda _: ["serve"],
        ),
    }
)
"""The programs by the name that ``exo launch`` takes."""
