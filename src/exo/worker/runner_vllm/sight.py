"""Pictures of prompts: vLLM's processor of the model makes tokens and tensors of them. Written for vLLM 0.32."""

import hashlib
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from exo.worker.protocol.commands import Picture, Prompt, Text
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.pictures import PictureError, Png
from exo.worker.runner_vllm.options import load_error
from exo.worker.runner_vllm.sequence import Seen

# Not all of these packages are in the environment that checks types, so plain imports would not type-check.
images = import_module("PIL.Image")
multimodal = import_module("vllm.multimodal")
context = import_module("vllm.multimodal.processing.context")
inputs = import_module("vllm.multimodal.inputs")
processing = import_module("vllm.multimodal.processing")

LIBRARY_ERRORS = (Exception, SystemExit)
"""The errors that a processor may raise. Neither vLLM nor transformers has a class for them."""
_SAMPLE = (64, 64)
"""The pixels of a picture that is encoded to try the processor."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    tokens: list[int]
    data: Any
    """Its tensors, by vLLM's names."""
    place: Any
    """Which of the tokens are computed from the tensors."""


class VllmSight:
    """Encodes prompts with pictures, each picture by itself. For one thread."""

    def __init__(self, config: Any, tokenizer: TransformersTokenizer, chunk: int) -> None:  # noqa: ANN401 -- vLLM's
        """Reads the processor in the model's folder, and tries it. A step computes ``chunk`` tokens of a prompt.

        Raises LoadError for a model that sees nothing here, or whose processor does not work.
        """
        model = config.model_config
        if not model.is_multimodal_model:
            raise _blind("vLLM has only a text model of this architecture")
        self._tokenizer, self._chunk, self._whole = tokenizer, chunk, bool(model.is_mm_prefix_lm)
        if self._whole and not config.scheduler_config.disable_chunked_mm_input:
            raise _blind("the tokens of a picture see each other in this model, which vLLM computes only on GPUs")
        self._latest: tuple[Prompt, Seen] = (), Seen([], [], [])
        registry = multimodal.MULTIMODAL_REGISTRY
        try:
            self._processor = registry.create_processor(model)
            text = registry._get_model_cls(model).get_placeholder_str("image", 1)  # there is no public method
            text = text or self._processor.dummy_inputs.get_dummy_text({"image": 1})
            self._stand_in = tokenizer.encode((Text(text=text, special=True),), add_bos=False)
            tokens = self._encode(images.new("RGB", _SAMPLE), "").tokens
        except LIBRARY_ERRORS as error:
            raise load_error(f"vLLM could not use the processor in {model.model}", error) from error
        if not 0 <= min(tokens) <= max(tokens) < tokenizer.n_vocab:
            raise _blind("the tokens of a picture are not in the model's vocabulary")

    def encode_prompt(self, prompt: Prompt) -> Seen:
        """Returns a prompt with pictures, BOS in front where due.

        Remembers the latest prompt, which several sequences may share. Raises PictureError.
        """
        if prompt is not self._latest[0]:
            self._latest = prompt, self._seen(prompt)
        return self._latest[1]

    def _seen(self, prompt: Prompt) -> Seen:
        seen, number, bos = Seen([], [], []), 0, self._tokenizer.bos
        texts = [self._tokenizer.encode((part,), add_bos=False) if isinstance(part, Text) else [] for part in prompt]
        begin = next(each for part, each in zip(prompt, texts, strict=True) if each or isinstance(part, Picture))
        if self._tokenizer.adds_bos and bos is not None and begin[:1] != [bos]:
            texts[0] = [bos, *texts[0]]
        for part, tokens in zip(prompt, texts, strict=True):
            seen.prompt.extend(tokens)
            seen.tokens.extend(tokens)
            if isinstance(part, Picture):
                number += 1
                self._add(Png(number, part), seen)
        return seen

    def _add(self, png: Png, seen: Seen) -> None:
        """Adds a picture. Raises PictureError."""
        image = images.frombytes("RGB", (png.width, png.height), png.rgb())
        digest = hashlib.sha256(png.data).hexdigest()
        try:
            found = self._encode(image, digest)
        except LIBRARY_ERRORS as error:
            raise PictureError(png.number, f"the model's processor refuses it ({error})") from error
        if self._whole and found.place.length > self._chunk:
            reason = f"its {found.place.length} tokens are computed in one step, which has at most {self._chunk}"
            reason = f"{reason}; max_num_batched_tokens in [vllm] of the model card sets that"
            raise PictureError(png.number, reason)
        place = replace(found.place, offset=found.place.offset + len(seen.tokens))
        seen.pictures.append(
            inputs.MultiModalFeatureSpec(
                data=found.data, modality="image", identifier=digest, mm_position=place, mm_hash=digest
            )
        )
        seen.tokens.extend(found.tokens)
        seen.prompt.extend([-1] * len(found.tokens))

    def _encode(self, image: Any, digest: str) -> _Encoded:  # noqa: ANN401 -- Pillow's
        """Raises anything, for a picture that the processor cannot read."""
        items = self._processor.info.parse_mm_data({"image": [image]})
        asked = processing.ProcessorInputs(list(self._stand_in), items, {"image": [digest]})
        found = self._processor.apply(asked, context.TimingContext(enabled=False))
        (data,), (place,) = found["mm_kwargs"]["image"], found["mm_placeholders"]["image"]
        return _Encoded(found["prompt_token_ids"], data, place)


def _blind(reason: str) -> LoadError:
    return LoadError("model_misconfigured", f"model card, [vllm] pictures: {reason}")
