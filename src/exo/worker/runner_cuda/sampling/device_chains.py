"""The ctypes edge of backend sampling: llama.cpp's samplers that run where the logits are computed.

Facts are those of llama.cpp 0.5.0-dev. Of its samplers only "top_k" is used. It hands back some largest logits of a
row, in no order, as they were computed. Which of several equals of the least are among them, each device decides for
itself. The sampler "greedy" tells no logit, and the whole row is copied beside its token.
"""

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.bindings import Context, EngineError, Logits

Tokens = npt.NDArray[np.int32]


class Chains:
    """What is attached to the slots of a context. For the thread that decodes."""

    def __init__(self, context: Context) -> None:
        self._handle, self._n_vocab = context.handle, context.n_vocab
        self._attached: dict[int, llama_cpp.llama_sampler_p] = {}

    def attach(self, slot: int, size: int) -> bool:
        """Has only the ``size`` largest logits of a slot's rows handed back, at most ``n_vocab``; 0: all of them.

        False where llama.cpp does not do so. With the next decode it reserves its graphs anew, and it takes no chain
        twice, so each one is made for one slot.
        """
        chain = None
        if size:
            chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(size))
        # The bindings do not say that there may be none.
        taken = llama_cpp.llama_set_sampler(self._handle, slot, chain)  # pyright: ignore[reportArgumentType]
        if (former := self._attached.pop(slot, None)) is not None:
            llama_cpp.llama_sampler_free(former)
        if chain is not None:
            self._attached[slot] = chain
        return taken

    def count(self, output: int, n_outputs: int) -> int:
        """How many logits were handed back of an output row of the last decode, which had ``n_outputs``.

        0: none by a chain, so that they are among all logits.
        """
        return llama_cpp.llama_get_sampled_candidates_count_ith(self._handle, output - n_outputs)

    def largest(self, first: int, n_outputs: int) -> tuple[Tokens, Logits]:
        """Views, shape (n_outputs - first, n_vocab), of ids and logits from output row ``first`` on, which has a chain.

        Of each row with a chain the first ``size`` places count; valid until the next decode. Raises EngineError.
        """
        shape = n_outputs - first, self._n_vocab
        ids = llama_cpp.llama_get_sampled_candidates_ith(self._handle, -shape[0])
        logits = llama_cpp.llama_get_sampled_logits_ith(self._handle, -shape[0])
        if ids is None or logits is None:
            raise EngineError("llama.cpp has no logits of a row that it was to find the largest of")
        return np.ctypeslib.as_array(ids, shape=shape), np.ctypeslib.as_array(logits, shape=shape)

    def free(self) -> None:
        """Call after the context is freed, which borrows them, or when it has none of them any more."""
        for chain in self._attached.values():
            llama_cpp.llama_sampler_free(chain)
        self._attached.clear()
