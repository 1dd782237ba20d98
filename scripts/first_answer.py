"""``make run``: starts the server, shows an answer of the demo model from each engine, serves until interrupted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import httpx
import psutil

from exo.chat.output.events import Content
from exo.cli.chat.answer_stream import answer
from exo.cli.server.http_client import ask, server_client
from exo.config import Settings
from exo.exit_code import CommandError

MODEL = "gemma-3-270m"
QUESTION = "What is the capital of France?"
START_SECONDS = 120


def main() -> None:
    """Exits with the server's status."""
    signal.signal(signal.SIGTERM, leave)
    settings = Settings.load()
    print("==> starting the server", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "exo", "serve", "--load", MODEL])
    try:
        with server_client(settings) as client:
            wait_until_ready(client, server)
            show_answer(client, MODEL, max_tokens=48)
            show_answer(client, f"{MODEL}@mlx", max_tokens=12)
        print("\n==> serving until interrupted (Ctrl-C)", flush=True)
        code = server.wait()
    except KeyboardInterrupt:
        code = server.wait()
    except CommandError as error:
        sys.exit(str(error))
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait()
    sys.exit(code)


def leave(number: int, _: object) -> None:
    """Handles a signal that may come before ``server`` is assigned: ends the server and exits."""
    for child in psutil.Process().children():
        child.terminate()
    sys.exit(128 + number)


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    """Returns when the model is loaded. Exits if the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    said = ""
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode)
        try:
            reply = client.get("/ready", timeout=5)
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


def show_answer(client: httpx.Client, model: str, max_tokens: int) -> None:
    """Streams one chat completion to the terminal, with its route and the command that repeats it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stop": ["\nUser:"],  # these are base weights, which have not learned to end a turn
        "stream": True,
    }
    route = json.loads(ask(client, "/v1/route", params={"model": model}, seconds=None))
    print(f"\n==> model:  {model}\n==> runner: {route['runner']}\n==> route:  {route['reason']}\n==> {QUESTION}")
    with answer(client, body) as events:
        for event in events:
            if isinstance(event, Content):
                print(event.text, end="", flush=True)
    url = f"{str(client.base_url).rstrip('/')}/v1/chat/completions"
    curl = f"curl -N {url} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
    print(f"\n==> to repeat it:{os.linesep}{curl}", flush=True)


if __name__ == "__main__":
    main()
