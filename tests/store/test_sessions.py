"""Processes that start while the model hub's session is open."""

import os

from huggingface_hub import get_session

from exo.store import hub


def test_a_new_process_does_not_close_the_hubs_session() -> None:
    """It would free OpenSSL objects, for whose lock it may wait for ever."""
    assert hub.constants.HF_HUB_DISABLE_TELEMETRY
    session = get_session()
    child = os.fork()
    if child == 0:
        os._exit(0 if not session.is_closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert get_session() is session
