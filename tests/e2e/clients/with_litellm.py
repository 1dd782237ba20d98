"""litellm: a chat, a stream and a call. Arguments: the server's URL and a model that calls what it must."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

url, model = sys.argv[1:]
common = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}
hi = [{"role": "user", "content": "hi"}]
whole = litellm.completion(**common, messages=hi, max_tokens=8, temperature=0, seed=1)
text = whole.choices[0].message.content
assert text, whole
assert whole.usage.completion_tokens == 8, whole
chunks = litellm.completion(**common, messages=hi, max_tokens=8, temperature=0, seed=1, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text

schema = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": schema}}
reply = litellm.completion(
    **common, messages=hi, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1
)
(call,) = reply.choices[0].message.tool_calls
assert call.function.name == "paint", call
assert json.loads(call.function.arguments)["colour"] in ("red", "blue"), call

too_long = [{"role": "user", "content": "word " * 100_000}]
for provider, base in (("openai", f"{url}/v1"), ("anthropic", url)):
    try:
        litellm.completion(model=f"{provider}/{model}", api_base=base, api_key="none", messages=too_long, max_tokens=8)
    except litellm.ContextWindowExceededError:
        continue
    raise AssertionError(f"{provider}: the prompt was not too long")
print("ok")
