"""Compiles a grammar in a process of its own before the runner does.

A grammar can be made so that compiling it takes for ever, and a thread that compiles cannot be stopped; a process can.
As a program it reads the model's control tokens on the first line and then a grammar a line, and answers each with a
line: what is wrong with it, empty if nothing is.
"""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
"""What a grammar may cost, in the runner too: 15 ms a token and 100 MB; llguidance's own where not named."""

SECONDS = 0.8
"""For one grammar."""
_BYTES = 1 << 30


class Vocabulary:
    """What llguidance's wrapper asks of a tokenizer. ``tokens`` are bytes by id; control tokens are ``special``."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self.built: LLTokenizer | None = None

    def __call__(self, text: bytes) -> list[int]:
        """Only a grammar that undoes "no_forcing" makes llguidance tokenize."""
        return [] if self.built is None else self.built.greedy_tokenize(text.decode())

    def build(self, ends: Sequence[int]) -> LLTokenizer:
        """The tokenizer, in which ``ends`` end generation. Holds the interpreter for a second for 262,144 tokens."""
        self.built = LLTokenizer(TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=list(ends))
        return self.built


@final
class Trial:
    """The program's other end. For one thread."""

    def __init__(self, special: Mapping[int, bytes], n_vocab: int, ends: Sequence[int]) -> None:
        """``special`` are the texts of the control tokens."""
        texts = {token: text.decode(errors="replace") for token, text in special.items()}
        self._first_line = json.dumps([texts, n_vocab, ends]).encode() + b"\n"
        self._program = self._start()

    def run(self, grammar: str) -> str:
        """What is wrong with a grammar as llguidance takes it; empty if nothing is. Takes a second at the most."""
        if self._program.poll() is not None:
            self.close()
            self._program = self._start()
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(grammar.encode() + b"\n")
        answer = self._program.stdout.readline()
        if not answer.endswith(b"\n"):
            self._program.wait()
            return "it takes too long, or too much memory, to compile"
        return json.loads(answer)

    def close(self) -> None:
        """Ends the program."""
        self._program.kill()
        with self._program:
            pass

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "exo.worker.runner_common.grammar_sandbox"]
        program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert program.stdin is not None
        program.stdin.write(self._first_line)
        return program


def tokenizer_of(texts: Mapping[str, str], n_vocab: int, ends: Sequence[int]) -> LLTokenizer:
    """One whose ordinary tokens are the bytes that text has, beyond the model's ids."""
    tokens = [b""] * n_vocab + [bytes([byte]) for byte in range(255)]
    for token, text in texts.items():
        tokens[int(token)] = text.encode()
    return Vocabulary(tokens, [int(token) for token in texts], ends[0]).build(ends)


def finding(tokenizer: LLTokenizer, grammar: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error() and not matcher.is_stopped():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    """Answers until standard input closes; ends by SIGALRM at a grammar that takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    tokenizer = tokenizer_of(*json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        found = finding(tokenizer, line.decode())
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
