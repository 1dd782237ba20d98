"""``make run``: starts the server, shows first answers of the demo model on both engines, serves until interrupted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import httpx

from exo.config import Settings

MODEL = "gemma-3-270m"
QUESTION = "What is the capital of France?"
START_SECONDS = 120


def main() -> None:
    """The exit code is the server's."""
    signal.signal(signal.SIGTERM, leave)
    settings = Settings.load()
    url = f"http://{settings.host}:{settings.port}"
    print("==> starting the server", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "exo", "serve", "--load", MODEL])
    try:
        wait_until_ready(url, server)
        show_answer(url, MODEL, max_tokens=48)
        show_answer(url, f"{MODEL}@mlx", max_tokens=12)
        print("\n==> serving until interrupted (Ctrl-C)", flush=True)
        code = server.wait()
    except KeyboardInterrupt:
        code = server.wait()
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait()
    sys.exit(code)


def leave(number: int, _: object) -> None:
    """A signal's handler: leaves in the way that ends the server."""
    sys.exit(128 + number)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Returns when the model can answer; ends the program if the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    said = ""
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode)
        try:
            reply = httpx.get(f"{url}/ready", timeout=5)
            if reply.status_code == 200:
                return
            message = reply.json()["error"]["message"]
            if "could not be loaded" in message:
                sys.exit(message)
            if message != said:
                print(f"    {message}", flush=True)
                said = message
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit(f"no model was ready within {START_SECONDS} seconds")


def show_answer(url: str, model: str, max_tokens: int) -> None:
    """Streams one chat completion to the screen, with its route and the way to repeat it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stop": ["\nUser:"],  # these are base weights, which have not learned to end a turn
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as reply:
        if reply.status_code != 200:
            sys.exit(reply.read().decode())
        print(f"\n==> model:  {model}")
        print(f"==> runner: {reply.headers['x-exo-runner']}")
        print(f"==> route:  {reply.headers['x-exo-route']}")
        print(f"==> {QUESTION}")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    print(choice["delta"].get("content", ""), end="", flush=True)
    curl = f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
    print(f"\n==> to repeat it:{os.linesep}{curl}", flush=True)


if __name__ == "__main__":
    main()
