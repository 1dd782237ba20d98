"""A sandbox program that carries out requests; each answer has the process's id."""

import json
import os
import signal
from functools import partial
from pathlib import Path

from exo.worker.runner_common.sandbox import SandboxLimits, serve

LIMITS = SandboxLimits(seconds=1, address_space=512 << 20, cpu_seconds=0.5)


def answer(setup: dict[str, str], line: bytes) -> dict[str, str]:
    request: dict[str, str] = json.loads(line)
    told = {"pid": str(os.getpid()), "text": request.get("text", "")}
    match request["do"]:
        case "hang":
            signal.pause()
        case "compute":
            while True:
                pass
        case "wait":
            Path(request["fifo"]).open("wb").close()  # waits for a reader
            signal.pause()
        case "die":
            os._exit(3)
        case "be long":
            told["text"] = "x" * (1 << 20)
        case "take memory":
            told["text"] = str(len(bytearray(LIMITS.address_space)))
        case "write":
            Path(request["file"]).write_text("x")
        case "tell the setup":
            told["text"] = setup["text"]
        case "tell the environment":
            told["text"] = " ".join(os.environ)
        case _:
            pass
    return told


if __name__ == "__main__":
    serve(lambda setup: partial(answer, json.loads(setup)), LIMITS)
