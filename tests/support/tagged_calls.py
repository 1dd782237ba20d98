"""Calls with an argument between tags, in the three formats that have them."""

from exo.chat.grammar.tool_schema import Tool

WRITE = Tool(
    "write",
    "Writes a file",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "mode": {"type": "integer"},
            "meta": {"type": "object"},
        },
        "required": ["path", "content"],
    },
)


LOOK = Tool("look", "", {"type": "object", "properties": {"place": {"type": "string"}, "day": {"type": "integer"}}})


TOOLS = (WRITE, LOOK)


def call(name: str, tool: str, **arguments: str) -> str:
    """A call as the model of format ``name`` writes it."""
    match name:
        case "qwen3-coder":
            inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
            return f"<tool_call>\n<function={tool}>\n{inside}</function>\n</tool_call>"
        case "glm":
            inside = "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items()
            )
            return f"<tool_call>{tool}\n{inside}</tool_call>"
        case _:
            inside = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items())
            return f'<minimax:tool_call>\n<invoke name="{tool}">\n{inside}</invoke>\n</minimax:tool_call>'


END = {"qwen3-coder": "</parameter>", "glm": "</arg_value>", "minimax": "</parameter>"}


KEY = {"qwen3-coder": "<parameter=", "glm": "<arg_key>", "minimax": '<parameter name="'}


DONE = {"qwen3-coder": "</parameter>\n</function>", "glm": "</arg_value>", "minimax": "</parameter>\n</invoke>"}
