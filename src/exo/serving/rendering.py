"""A conversation's prompt, and how its request is told to reason."""

from collections.abc import Mapping

from pydantic import JsonValue

from exo.chat.output.registry import OutputFormat, output_format
from exo.chat.sandbox_pool import SandboxBusyError
from exo.chat.template.reasoning import effort_variables, empty_reasoning
from exo.chat.template.renderer import (
    GIVEN,
    ConversationRefusedError,
    PromptTooLongError,
    TemplateError,
    ToolsUnsupportedError,
    VariableRefusedError,
    chat_prompt,
)
from exo.chat.template.special_tokens import NoncharacterError
from exo.serving.app_state import Services
from exo.serving.errors import RequestError, busy, from_failed
from exo.serving.failover import LoadedRunner
from exo.serving.request import Conversation
from exo.serving.warnings import warn
from exo.worker.protocol.messages import Failed, Text

_SWITCHES = ("enable_thinking", "thinking")


def format_of(runner: LoadedRunner) -> OutputFormat:
    """How the runner's model writes reasoning and calls."""
    card = runner.card
    return output_format(runner.capabilities.chat_template, card.tool_format, card.reasoning_dialect)


async def render(
    services: Services, runner: LoadedRunner, conversation: Conversation, prompt_field: str
) -> tuple[Text, ...]:
    """The conversation's prompt. Raises ``ServingError``."""
    if runner.capabilities.chat_template is None:
        raise RequestError(
            "this model has no chat template; set chat_template in its model card, or use /v1/completions",
            code="no_chat_template",
            param="model",
        )
    try:
        return await _render(services, runner, conversation)
    except SandboxBusyError as error:
        raise busy(prompt_field, error) from None
    except VariableRefusedError as error:
        param = f"chat_template_kwargs.{error.name}"
        raise RequestError(f"{param}: {error}", code="unsupported_parameter", param=param) from None
    except ToolsUnsupportedError as error:
        raise RequestError(f"tools: {error}", code="unsupported_parameter", param="tools") from None
    except ConversationRefusedError as error:
        raise RequestError(str(error), code="invalid_value", param=prompt_field) from None
    except NoncharacterError as error:
        raise RequestError(f"{prompt_field}: {error}", code="invalid_value", param=prompt_field) from None
    except TemplateError as error:
        raise RequestError(str(error), code="template_error", param=prompt_field) from None
    except PromptTooLongError as error:
        failed = Failed(code="context_length_exceeded", message=str(error))
        raise from_failed(failed, params={"prompt": prompt_field}) from None


async def _render(services: Services, runner: LoadedRunner, conversation: Conversation) -> tuple[Text, ...]:
    """The prompt, which ends behind an empty reasoning block where the model is not to reason and has no switch for it.

    Raises what ``chat_prompt`` raises.
    """
    model, variables = runner.capabilities, dict(conversation.variables)
    assert model.chat_template is not None
    ways = effort_variables(model.chat_template, conversation.effort)
    texts: tuple[Text, ...] | None = None
    way: dict[str, JsonValue] = {}
    while texts is None:
        way = {**ways[0], **variables}
        try:
            texts = await chat_prompt(
                services.templates,
                model,
                conversation.messages,
                tools=[tool.definition() for tool in conversation.tools],
                variables=way,
                continue_final_message=conversation.continues,
            )
        except VariableRefusedError as error:
            if error.name in GIVEN:
                raise
            if error.name not in variables:
                del ways[0]
            elif variables.pop(error.name) is not False or error.name not in _SWITCHES:
                warn(f"chat_template_kwargs.{error.name}", "this model's chat template does not read it")
    form = format_of(runner)
    off = conversation.effort == "none" or any(conversation.variables.get(name) is False for name in _SWITCHES)
    if off and not conversation.continues:
        prompt = "".join(text.text for text in texts)
        switched = way.get("reasoning_effort") == "none" or any(name in way for name in _SWITCHES)
        if form.starts_in_reasoning(prompt) or not switched:
            return (*texts, *_special(empty_reasoning(form, prompt)))
    elif conversation.effort not in (None, "none"):
        _tell_effect(conversation, form, way)
    return texts


def _special(text: str) -> tuple[Text, ...]:
    return (Text(text=text, special=True),) if text else ()


def _tell_effect(conversation: Conversation, form: OutputFormat, way: Mapping[str, JsonValue]) -> None:
    """Warns where the effort that is asked for changes nothing."""
    if form.thinking is None and not way:
        warn(conversation.effort_param, "this model does not reason, so it has no effect")
    elif "reasoning_effort" not in way and conversation.effort != "medium":
        warn(
            conversation.effort_param, "this model's chat template knows no levels of reasoning, so it only turns it on"
        )
