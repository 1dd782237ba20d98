"""The nodes of a Ray cluster as hosts. Ray itself runs in other processes: see ``ray_host``."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from exo.worker.protocol.remote_host import LOCAL, HostsError, RemoteHost

ENVIRONMENT = ".venv-ray"
REMEDY = "pip install 'exo[ray]'"
_PROGRAM = Path(__file__).with_name("ray_host.py")
_ANSWER_SECONDS = 60.0


def ray_hosts(address: str) -> tuple[RemoteHost, ...]:
    """Returns the nodes of the cluster at "HOST:PORT", except this machine's. "auto" is the cluster that runs here.

    They have no address for engines: a model is divided among hosts only if the user's file names an address. Raises
    ``HostsError``.
    """
    command = (ray_python(), "-P", str(_PROGRAM), address)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
        nodes: list[str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise HostsError(f"--ray: the cluster {address} does not answer within {_ANSWER_SECONDS:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2] or f"exit status {error.returncode}"
        raise HostsError(f"--ray: there is no way into the cluster {address}: {said}") from error
    hosts = {re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip("_.-"): (*command, name) for name in nodes}
    if LOCAL in hosts or "" in hosts:
        raise HostsError(
            f"--ray: a node needs a name with letters or digits that is not {LOCAL}: ray start --node-name"
        )
    return tuple(RemoteHost(name, run) for name, run in hosts.items())


def ray_python() -> str:
    """Returns a Python that has Ray: this one, or that of an environment beside it. Raises ``HostsError``."""
    if find_spec("ray") is not None:
        return sys.executable
    other = Path(sys.prefix).with_name(ENVIRONMENT) / "bin" / "python"
    if not other.exists():
        raise HostsError(f"--ray: Ray is not installed; to fix it: {REMEDY}")
    return str(other)
