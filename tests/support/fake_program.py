"""The fake runner as a program: ``python -m tests.support.fake_program``.

``--probe`` answers like any runner, and at once, because every server in the tests asks that first.
"""

import json
import sys


def main() -> None:
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps({"installed": True, "engine": "fake", "version": "1", "backends": ["LlamaCppCpu"]}))
        return
    from tests.support import fake_runner

    fake_runner.main()


if __name__ == "__main__":
    main()
