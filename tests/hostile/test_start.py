"""Servers that are started wrongly, or where another is: told in words, and nothing harmed.

The numbers in the names are of the same table as in test_input.
"""

import subprocess
import sys
import time
from pathlib import Path

import httpx
from pydantic import JsonValue

from tests import DATA
from tests.support.server import ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf

TABLE: dict[str, JsonValue] = {"slots": 2, "n_ctx": 512, "threads": 1}


def write_model(home: Path) -> None:
    write_gguf(home / "good.gguf", Shape())
    write_card(home, "good", {"cuda": {**TABLE, "path": str(home / "good.gguf")}})


def refused(reply: httpx.Response, status: int) -> None:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def refuses_to_start(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "exo", "serve", *([] if "--port" in arguments else ["--port", "0"]), *arguments]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    return done.stderr


def test_row_27_a_port_in_use_costs_the_server_that_has_it_nothing(tmp_path: Path) -> None:
    with ServeProgram(tmp_path) as server:
        port = str(httpx.URL(server.url).port)
        said = refuses_to_start(tmp_path, "--port", port)
        assert f"port {port} on 127.0.0.1 is in use" in said
        assert "--port" in said
        assert "Traceback" not in said
        assert server.client.get("/health").json() == {"status": "ok"}


def test_row_27_two_servers_with_one_directory_share_it(tmp_path: Path) -> None:
    """It is only read, but for the runners' logs, to which both append."""
    write_model(tmp_path)
    body = {"max_tokens": 20, "temperature": 1, "seed": 3}
    with ServeProgram(tmp_path) as one, ServeProgram(tmp_path) as other:
        texts = {each.complete("good", **body).json()["choices"][0]["text"] for each in (one, other)}
        assert len(texts) == 1
        (runner,) = one.runners()
        other.runners()[0].kill()
        for each in (one, other):
            assert each.complete("good", **body).json()["choices"][0]["text"] in texts
        assert one.runners() == [runner]


def test_row_31_a_models_name_forges_no_line_of_the_log(tmp_path: Path) -> None:
    name = "a\nERROR: forged\x1b[2J"
    with ServeProgram(tmp_path, "--load", name) as server:
        while "could not be loaded" not in server.client.get("/ready").json()["error"]["message"]:
            time.sleep(0.02)
        (line,) = (line for line in server.log.read_text().split("\n") if "forged" in line)
        assert line.startswith("ERROR: a\\nERROR: forged\\x1b[2J: no model card is called")
        assert "\x1b" not in server.log.read_text()


def test_row_28_a_public_server_needs_a_key_or_the_word(tmp_path: Path) -> None:
    said = refuses_to_start(tmp_path, "--host", "0.0.0.0")
    assert "--api-key-file" in said
    assert "--insecure" in said
    with ServeProgram(tmp_path, "--host", "0.0.0.0", "--insecure") as server:
        port = server.url.rpartition(":")[2]
        local = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"host": f"192.168.1.5:{port}"}, timeout=60)
        assert local.status_code == 200
        refused(httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"host": "evil.example"}, timeout=60), 403)


def test_row_29_a_public_server_with_a_key_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ops:correct-horse\n")
    arguments = ("--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys"))
    with ServeProgram(tmp_path, *arguments) as server:
        refused(server.client.get("/v1/models"), 401)
        assert server.client.get("/health").status_code == 200
        key = {"authorization": "Bearer correct-horse", "host": "exo.example"}
        assert server.client.get("/v1/models", headers=key).status_code == 200
    assert "correct-horse" not in (tmp_path / "serve.log").read_text()
    said = refuses_to_start(tmp_path, "--api-key", "a:short")
    assert "short" not in said


def test_https_and_run_through_it(tmp_path: Path) -> None:
    write_model(tmp_path)
    certificate, key = str(DATA / "localhost.pem"), str(DATA / "localhost.key.pem")
    tls = ("--ssl-certfile", certificate, "--ssl-keyfile", key)
    with ServeProgram(tmp_path, *tls, "--api-key", "me:secret-secret") as server:
        assert server.url.startswith("https://127.0.0.1:")
        flags = ("--port", server.url.rpartition(":")[2], "--ssl-certfile", certificate)
        command = [sys.executable, "-m", "exo", "run", "good", "once upon", "--max-tokens", "5", *flags]
        variables = environment(tmp_path)
        key = {"EXO_API_KEY": "secret-secret"}
        done = subprocess.run(command, env=variables | key, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert len(server.runners()) == 1  # so it was the server that answered
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "API key is needed" in done.stderr
    assert "cannot be used" in refuses_to_start(tmp_path, "--ssl-certfile", str(DATA / "localhost.key.pem"))
