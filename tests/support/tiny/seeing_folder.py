"""Writes a tiny model that sees pictures as a folder of safetensors: Idefics 3, which vLLM computes on any CPU."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from tests.support.tiny.mlx_folder import write_mlx
from tests.support.tiny.shape import Shape

PICTURE = "<image>"
AROUND = "<fake_token_around_image>"
CONTROL = (AROUND, PICTURE, "<global-img>", "<end_of_utterance>")
"""The control tokens that the processor of such models uses."""
SIDE, PATCH, SHUFFLED = 64, 8, 2
TOKENS = (SIDE // PATCH // SHUFFLED) ** 2 + 3
"""The tokens of a picture: its square patches, several of which are one token, and three around them."""
WIDTH, INNER, LAYERS = 64, 128, 2
Tensors = dict[str, NDArray[np.float32]]


def write_seeing(folder: Path, shape: Shape) -> None:
    """Write the llama ``shape`` with a random encoder of pictures. Raises ValueError for a quantised ``shape``."""
    write_mlx(folder, shape)
    tensors = {
        name.replace("model.", "model.text_model.", 1): _with_control(tensor) if _is_vocabulary(name) else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    draw = np.random.default_rng(shape.seed)
    save_file({**tensors, **_encoder(draw), **_connector(draw, shape.hidden)}, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    first = text["vocab_size"]
    text["vocab_size"] += len(CONTROL)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][-1], "id": token, "content": content}
        for token, content in enumerate(CONTROL, start=first)
    ]
    for name, content in {
        "config.json": _config(text, first + CONTROL.index(PICTURE)),
        "tokenizer.json": tokenizer,
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": TOKENS - 3},
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_image_splitting": False,
            "size": {"longest_edge": SIDE},
            "max_image_size": {"longest_edge": SIDE},
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _config(text: dict[str, object], picture: int) -> dict[str, object]:
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": picture,
        "pad_token_id": text["eos_token_id"],
        "scale_factor": SHUFFLED,
        "torch_dtype": text["torch_dtype"],
        "eos_token_id": text["eos_token_id"],
        "text_config": text,
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
    }


def _is_vocabulary(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _with_control(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Adds the rows of the control tokens, which are as unlikely as the last one."""
    return np.concatenate([tensor, np.repeat(tensor[-1:], len(CONTROL), axis=0)])


def _encoder(draw: np.random.Generator) -> Tensors:
    model, patches = "model.vision_model", (SIDE // PATCH) ** 2
    tensors = {
        f"{model}.embeddings.patch_embedding.weight": _random(draw, WIDTH, 3, PATCH, PATCH),
        f"{model}.embeddings.patch_embedding.bias": np.zeros(WIDTH, np.float32),
        f"{model}.embeddings.position_embedding.weight": _random(draw, patches, WIDTH),
    }
    for layer in range(LAYERS):
        name = f"{model}.encoder.layers.{layer}"
        tensors |= _norm(f"{name}.layer_norm1") | _norm(f"{name}.layer_norm2")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _linear(draw, f"{name}.self_attn.{part}", WIDTH, WIDTH)
        tensors |= _linear(draw, f"{name}.mlp.fc1", INNER, WIDTH) | _linear(draw, f"{name}.mlp.fc2", WIDTH, INNER)
    return tensors | _norm(f"{model}.post_layernorm")


def _connector(draw: np.random.Generator, hidden: int) -> Tensors:
    return {"model.connector.modality_projection.proj.weight": _random(draw, hidden, WIDTH * SHUFFLED**2)}


def _linear(draw: np.random.Generator, name: str, rows: int, columns: int) -> Tensors:
    return {f"{name}.weight": _random(draw, rows, columns), f"{name}.bias": np.zeros(rows, np.float32)}


def _norm(name: str) -> Tensors:
    return {f"{name}.weight": np.ones(WIDTH, np.float32), f"{name}.bias": np.zeros(WIDTH, np.float32)}


def _random(draw: np.random.Generator, rows: int, *columns: int) -> NDArray[np.float32]:
    """Maps a vector of root mean square 1 to one of about 1."""
    return (draw.standard_normal((rows, *columns)) / np.sqrt(np.prod(columns))).astype(np.float32)
