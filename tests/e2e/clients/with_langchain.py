"""langchain-openai: a chat, a stream and a call. Arguments: the server's URL and a model that calls what it must."""

import sys

from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
llm = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=8, temperature=0, seed=1)
whole = llm.invoke("hi")
assert whole.content, whole
assert whole.usage_metadata["output_tokens"] == 8, whole
streamed = "".join(chunk.content for chunk in llm.stream("hi"))
assert streamed == whole.content, (streamed, whole.content)


def paint(colour: str, size: int) -> str:
    """Paints something.

    Args:
        colour: one of red and blue
        size: in metres
    """
    return f"{colour} {size}"


caller = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, seed=1).bind_tools(
    [paint], tool_choice="paint", strict=True, parallel_tool_calls=False
)
(call,) = caller.invoke("paint it").tool_calls
assert call["name"] == "paint", call
assert set(call["args"]) == {"colour", "size"}, call
print("ok")
