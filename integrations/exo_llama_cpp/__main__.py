"""Becomes the llama.cpp runner, which finds its own package ``exo`` first, as do the processes that it starts."""

import os
import sys

from exo_llama_cpp import TREE

path = os.pathsep.join(filter(None, (str(TREE), os.environ.get("PYTHONPATH"))))
command = [sys.executable, "-X", "utf8", "-m", "exo.worker.runner_cuda", *sys.argv[1:]]
os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
