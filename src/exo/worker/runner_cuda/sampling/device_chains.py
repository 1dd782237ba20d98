"""The ctypes edge of backend sampling: llama.cpp's samplers that run on the device that computes the logits.

Written for llama.cpp 0.5.0-dev. Only its sampler "top_k" is used. It returns a row's k largest logits unchanged and in
no particular order. Among equals of the least one, the choice depends on the device. The sampler "greedy" would return
no logit, and llama.cpp copies the whole row in addition to its token.
"""

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.bindings import Context, EngineError, Logits

Tokens = npt.NDArray[np.int32]


class Chains:
    """The sampler chains attached to a context's slots. Used by the thread that decodes."""

    def __init__(self, context: Context) -> None:
        self._handle, self._n_vocab = context.handle, context.n_vocab
        self._attached: dict[int, llama_cpp.llama_sampler_p] = {}

    def attach(self, slot: int, size: int) -> bool:
        """Has only the ``size`` largest logits of the slot's rows returned, or all of them if ``size`` is 0.

        Returns false if llama.cpp refuses. With the next decode it reserves its graphs again. It accepts a chain only
        once, so each slot gets a new one.
        """
        chain = None
        if size:
            chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(size))
        # The bindings do not declare that the chain may be None.
        taken = llama_cpp.llama_set_sampler(self._handle, slot, chain)  # pyright: ignore[reportArgumentType]
        if (former := self._attached.pop(slot, None)) is not None:
            llama_cpp.llama_sampler_free(former)
        if chain is not None:
            self._attached[slot] = chain
        return taken

    def count(self, output: int, n_outputs: int) -> int:
        """Returns how many logits a chain returned for an output row of the last decode, which had ``n_outputs``.

        It is 0 for a row without a chain, whose logits are in the array of all logits.
        """
        return llama_cpp.llama_get_sampled_candidates_count_ith(self._handle, output - n_outputs)

    def largest(self, first: int, n_outputs: int) -> tuple[Tokens, Logits]:
        """Returns views, shape (n_outputs - first, n_vocab), of ids and logits from output row ``first`` on.

        Row ``first`` must have a chain. In a row with a chain, the first ``size`` places are valid. The views are valid
        until the next decode. Raises EngineError.
        """
        shape = n_outputs - first, self._n_vocab
        ids = llama_cpp.llama_get_sampled_candidates_ith(self._handle, -shape[0])
        logits = llama_cpp.llama_get_sampled_logits_ith(self._handle, -shape[0])
        if ids is None or logits is None:
            raise EngineError("llama.cpp returned no logits for a row with a sampler chain")
        return np.ctypeslib.as_array(ids, shape=shape), np.ctypeslib.as_array(logits, shape=shape)

    def free(self) -> None:
        """Frees the chains. Call it after the context is freed, which borrows them."""
        for chain in self._attached.values():
            llama_cpp.llama_sampler_free(chain)
        self._attached.clear()
