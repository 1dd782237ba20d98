"""llm: a chat, a stream and a call, with a model that its user has configured. Arguments: the server's URL, a model."""

import os
import sys
import tempfile
from pathlib import Path

url, name = sys.argv[1:]
with tempfile.TemporaryDirectory() as directory:
    os.environ["LLM_USER_PATH"] = directory
    configured = (
        f"- model_id: mine\n  model_name: {name}\n  api_base: {url}/v1\n  can_stream: true\n  supports_tools: true\n"
    )
    Path(directory, "extra-openai-models.yaml").write_text(configured)
    import llm

    model = llm.get_model("mine")
    model.key = "none"
    whole = model.prompt("hi", stream=False, max_tokens=8, temperature=0, seed=1).text()
    assert whole
    pieces = list(model.prompt("hi", stream=True, max_tokens=8, temperature=0, seed=1))
    assert "".join(pieces) == whole, (pieces, whole)

    called = []

    def paint(colour: str) -> str:
        """Paints something."""
        called.append(colour)
        return "done"

    # llm has no way to demand a call, so the card's model does nothing else: see the test.
    response = model.prompt("paint it", tools=[paint], stream=False, max_tokens=200, seed=1)
    response.text()
    (call,) = response.tool_calls()
    assert call.name == "paint", call
    assert response.execute_tool_calls()[0].output == "done"
    assert called == [call.arguments["colour"]]
print("ok")
