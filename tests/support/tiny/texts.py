"""Texts for tiny models, and log-probabilities of their logits."""

import numpy as np
from numpy.typing import NDArray

TEXTS = [
    "Hello world",
    " the stopper and a hello world",
    "naïve café, Ærøskøbing",
    "你好 и здравствуй",
    "😀👩‍👩‍👧 done",
    "one\n\n  two\t\r\n three   ",
    "I'll say they're 1234 things; don't!",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end",
    "",
]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
