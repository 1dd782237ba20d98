"""The JSON Schemas of a request, in the form that grammars enforce, in every dialect alike."""

from collections.abc import Mapping
from dataclasses import replace

from pydantic import JsonValue
from pydantic_core import from_json, to_json

from exo.chat.grammar.tool_schema import NamedChoice, Tool
from exo.serving.errors import RequestError
from exo.serving.request import Conversation, GenerationRequest, OutputConstraint, Prompt
from exo.serving.warnings import warn
from exo.worker.protocol.messages import Failed
from exo.worker.runner_common.grammar.grammar_errors import named
from exo.worker.runner_common.grammar.json_schema import LONGEST_SOURCE, SchemaError, enforced, guided


def with_enforced_schemas(request: GenerationRequest) -> GenerationRequest:
    """The request, whose schemas can be enforced. Warns of each keyword that is not. Raises ``ServingError``."""
    constraint = request.constraint
    if constraint is not None and constraint.syntax == "json_schema" and len(constraint.source) <= LONGEST_SOURCE:
        constraint = _constraint(constraint)
    return replace(request, constraint=constraint, prompts=tuple(map(_prompt, request.prompts)))


def naming_tools(failed: Failed, request: GenerationRequest) -> Failed:
    """A failure that names the tools, where it is their grammar's and does not name one."""
    tools = [tool.name for prompt in request.prompts if isinstance(prompt, Conversation) for tool in prompt.forced]
    if failed.param != "grammar" or not tools or ": tool " in failed.message:
        return failed
    names = ", ".join(map(repr, tools[:5])) + (f" and {len(tools) - 5} more" if len(tools) > 5 else "")
    reason = failed.message.removeprefix("grammar: ")
    which = "tool" if len(tools) == 1 else "tools"
    return failed.model_copy(update={"message": f"grammar: {which} {names}: {reason}"})


def _constraint(constraint: OutputConstraint) -> OutputConstraint:
    param = constraint.param
    try:
        found = enforced(from_json(constraint.source))
    except ValueError:
        return constraint  # the runner says what is wrong with it
    except SchemaError as error:
        where = ".".join(filter(None, (param, error.where)))
        raise RequestError(f"{where}: {error.reason}", code="unsupported_value", param=param) from None
    for note in found.notes:
        warn(f"{param}.{note.where}", note.text)
    return replace(constraint, source=to_json(guided(found.schema)).decode())


def _prompt(prompt: Prompt) -> Prompt:
    if not isinstance(prompt, Conversation) or not prompt.must_call:
        return prompt
    tools = prompt.tools
    if isinstance(prompt.choice, NamedChoice):
        tools = tuple(tool for tool in tools if tool.name == prompt.choice.name)
    return replace(prompt, forced=tuple(_tool(tool, prompt.choice_param) for tool in tools))


def _tool(tool: Tool, param: str) -> Tool:
    """A tool whose arguments can be held to its schema, and whose schema says whose it is."""
    owner = f"tool {tool.name!r}"
    try:
        found = enforced({key: each for key, each in tool.parameters.items() if key != "nullable"})
    except SchemaError as error:
        raise RequestError(f"{param}: {owner}: {error}", code="unsupported_value", param=param) from None
    for note in found.notes:
        warn(f"{owner}: {note.where}", note.text)
    parameters = found.schema if isinstance(found.schema, dict) else dict[str, JsonValue](tool.parameters)
    properties = parameters.get("properties")
    if isinstance(properties, Mapping):
        owned: dict[str, JsonValue] = {
            name: named(each, f"{owner}, property {name!r}") if isinstance(each, dict) else each
            for name, each in properties.items()
        }
        parameters = {**parameters, "properties": owned}
    return replace(tool, parameters=named(parameters, owner))
