import io
import logging

from exo.api.http.log import OneLineFormatter


def test_what_a_client_sent_begins_no_line_and_reaches_no_terminal() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(OneLineFormatter("%(levelname)s: %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.error("no model is called %s", "a\nINFO: all is well\r\x1b[2J\u2028\x85 é")
    assert written.getvalue() == "ERROR: no model is called a\\nINFO: all is well\\r\\x1b[2J\\u2028\\x85 é\n"
    try:
        raise ValueError("kept")
    except ValueError:
        log.exception("failed")
    assert written.getvalue().endswith("\nValueError: kept\n")
