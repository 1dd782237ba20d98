"""Constraints on the fake runner's output. A module of its own, since most runners in the tests never need it."""

from exo.worker.protocol.commands import Generate
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.constraint import Constraint, ReasoningBudget
from exo.worker.runner_common.grammar.guided_decoding import GrammarCompiler, GrammarError, grammar_failure
from tests.support.fake_model import EOS, SPECIAL_TOKENS, Vocabulary


class FakeConstraints:
    def __init__(self) -> None:
        special = SPECIAL_TOKENS.values()
        self._compiler = GrammarCompiler(Vocabulary().piece_of, lambda token: token in special, [EOS], 258)

    def of(self, request: Generate) -> Constraint | Failed:
        """The constraint of a request that has one, or the error of a grammar that cannot be."""
        grammar, budget = None, None
        try:
            if request.grammar is not None:
                grammar = self._compiler.compile(request.grammar, request.delivered)
        except GrammarError as error:
            return grammar_failure(request.id, error)
        if (limit := request.reasoning) is not None:
            budget = ReasoningBudget(limit, list(limit.closing.encode()), Vocabulary().piece_of, request.delivered)
        return Constraint(258, grammar, budget)
