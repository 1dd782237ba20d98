"""What a dead runner's standard error comes to in words."""

import subprocess
import sys
from pathlib import Path

from exo.worker.supervisor.crash_report import StderrLog, diagnose

ASSERTION = "/src/llama.cpp/src/llama-vocab.cpp:3012: GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"
GDB = """[New LWP 101]
[Thread debugging using libthread_db enabled]
Using host libthread_db library "/lib/x86_64-linux-gnu/libthread_db.so.1".
0x00007f in wait4 () from /lib/x86_64-linux-gnu/libc.so.6
warning: 30\t../sysdeps/unix/sysv/linux/wait4.c: No such file or directory
"""
FRAMES = "".join(
    f"#{number}  0x00007f{number:06x} in frame_{number} () from /lib/libggml-base.so\n" for number in range(200)
)


def test_an_assertion_is_told_in_front_of_a_debuggers_backtrace(tmp_path: Path) -> None:
    log = StderrLog(tmp_path / "log")
    log.write(f"loading\n{ASSERTION}\n{GDB}{FRAMES}[Inferior 1 (process 100) detached]\n".encode())
    shown = log.last_lines()
    log.close()
    failed = diagnose("was killed by SIGABRT", shown)
    reason = "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed (llama-vocab.cpp:3012)"
    assert failed.message.startswith(f"the runner was killed by SIGABRT; {reason}; the end")
    assert "#17" not in failed.message
    assert "LWP" not in failed.message
    assert "loading" in failed.message


def test_an_engine_that_crashes_while_it_loads_would_do_so_again() -> None:
    failed = diagnose("was killed by SIGABRT", f"loading\n{ASSERTION}\n{GDB}", loading=True)
    assert failed.code == "model_load_failed"
    assert "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed (llama-vocab.cpp:3012)" in failed.message
    assert "LWP" not in failed.message
    assert diagnose("was killed by SIGFPE", "", loading=True).code == "model_load_failed"
    assert diagnose("was killed by SIGSEGV", "CUDA error: 700", loading=True).code == "runner_died"
    assert diagnose("was killed by SIGKILL", "", loading=True).code == "runner_died"


def test_ordinary_last_words_stay_as_they_are() -> None:
    failed = diagnose("exited with code 7", "ValueError: it failed\n#hashtag")
    assert (
        failed.message
        == "the runner exited with code 7; the end of its standard error:\nValueError: it failed\n#hashtag"
    )


def test_ggml_starts_no_debugger_in_the_runner() -> None:
    program = (
        "import os, sys; sys.argv = ['runner', '--probe']; from exo.worker.runner_cuda.__main__ import main; main();"
        "print(os.environ['GGML_NO_BACKTRACE'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"


def test_a_part_of_the_model_that_has_gone_is_no_fault_of_the_model() -> None:
    """Also while it loads: another process may find the host again."""
    said = "/src/ggml-rpc.cpp:569: GGML_ABORT: Remote RPC server crashed or returned malformed response"
    failed = diagnose("was killed by SIGABRT", said, loading=True)
    assert failed.code == "runner_died"
    assert "a process or a host that had a part of the model has gone" in failed.message
