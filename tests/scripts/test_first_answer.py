"""``make run`` and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests import ROOT

SCRIPT = ROOT / "scripts" / "first_answer.py"


def test_a_sigterm_ends_the_server_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "EXO_HOME": str(tmp_path), "EXO_PORT": str(port)}
    with subprocess.Popen([sys.executable, str(SCRIPT)], env=environment, stdout=subprocess.PIPE) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"==> starting the server\n"
        while not (children := psutil.Process(script.pid).children()):
            time.sleep(0.01)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=60)[1] == []
