"""A folder in the format of transformers, as the source of first weights: its config and, one by one, its tensors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastruct.errors import Problem, UserError
from megastruct.huggingface.stock import ARCEE, GRANITE, LLAMA, MISTRAL, QWEN3, STABLELM, STARCODER2, StockClass

CLASSES = {stock.model_type: stock for stock in (LLAMA, MISTRAL, QWEN3, STARCODER2, ARCEE, STABLELM, GRANITE)}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others are quantised, with scales elsewhere
_SAME_ACTIVATION = {"gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "silu": ("silu", "swish")}


@dataclass(frozen=True)
class Source:
    """An opened folder. `values`: its config.json, with the defaults of its class. `files`: by name of tensor."""

    folder: Path
    stock: StockClass
    values: Mapping[str, Any]
    files: Mapping[str, Path]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name in float32.

        Raises UserError if it is missing, cannot be read, is quantised, or has values that are not finite.
        """
        from safetensors import SafetensorError, safe_open

        if name not in self.files:
            raise UserError(Problem(str(self.folder), f"has no tensor {name}", "download the folder again"))
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(Problem(str(self.files[name]), f"cannot be read: {error}", "download it again")) from None
        if tensor.dtype not in _DTYPES:
            found = f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}"
            raise UserError(Problem(str(self.files[name]), found, "a folder that is not quantised"))
        if not torch.isfinite(tensor).all():
            raise UserError(Problem(str(self.files[name]), f"{name} has values that are not finite", "other weights"))
        return tensor.float()

    @property
    def rope(self) -> Mapping[str, Any]:
        """The parameters of the rotary embedding, which version 4 of transformers kept in the config itself."""
        return {**self.values, **(self.values.get("rope_scaling") or {}), **(self.values.get("rope_parameters") or {})}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.values["tie_word_embeddings"])

    def model_keys(self) -> dict[str, Any]:
        """The keys of our config's section `model` that the weights need, by their values in the folder."""
        values, heads = self.values, self.values["num_attention_heads"]
        return {
            "hidden_size": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
            "ffn_hidden_size": values["intermediate_size"],
            "vocab_size": values["vocab_size"],
            "activation": self.stock.activation,
            "norm": self.stock.norm,
            "norm_eps": values[self.stock.eps_key],
            "qk_norm": self.stock.qk_norm,
            "rope_base": float(self.rope["rope_theta"]),
        }


def open_source(folder: Path) -> Source:
    """Read config.json and find the tensors.

    Raises UserError if the folder is not one of transformers, or has anything that this project's models lack.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = f"has no readable config.json ({getattr(error, 'strerror', None) or error})"
        raise UserError(Problem(str(folder), found, "give a folder in the format of transformers")) from None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in CLASSES:
        found = f"model_type is {model_type!r}, but only {', '.join(CLASSES)} can be imported"
        close = difflib.get_close_matches(str(model_type), CLASSES, n=1, cutoff=0.0)
        raise UserError(Problem(f"{folder}/config.json", found, f"a model of another type, such as {close[0]}"))
    if values.get("quantization_config"):
        found = f"quantization_config is {str(values['quantization_config'])[:80]}: the weights are quantised"
        raise UserError(Problem(f"{folder}/config.json", found, "the folder of the model before it was quantised"))
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError:
        raise UserError(Problem("transformers", "not installed", "pip install 'megastruct[huggingface]'")) from None
    try:
        with_defaults = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # of any kind: every class checks its keys in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        found = f"is refused by transformers: {reason}"
        raise UserError(Problem(f"{folder}/config.json", found, "download the folder again")) from None
    source = Source(folder, CLASSES[model_type], with_defaults, _find_tensors(folder))
    if problems := [Problem(f"{folder}/config.json", found) for found in _without_counterpart(source)]:
        raise UserError(problems, headline=f"{folder} cannot be imported exactly")
    return source


def _find_tensors(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / _INDEX).exists():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in index.items()}
        with safe_open(folder / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        found = f"has no readable {_SINGLE} or {_INDEX} ({error})"
        raise UserError(Problem(str(folder), found, "save the model again with save_pretrained")) from None


def _without_counterpart(source: Source) -> list[str]:
    """What the folder's model does and ours cannot, as "key is value"."""
    values, stock, rope = source.values, source.stock, source.rope
    wanted: dict[str, tuple[Any, ...]] = {
        key: (value,) for key, value in stock.fixed if not key.endswith("dropout") and key in {**values, **rope}
    }
    wanted["hidden_act"] = _SAME_ACTIVATION[stock.hidden_act]
    wanted["rope_type"] = ("default",)
    if stock is GRANITE:
        wanted["attention_multiplier"] = (source.model_keys()["head_dim"] ** -0.5,)
    found = {**rope, **values, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    return [
        f"{key} is {found[key]!r}, which has no counterpart here (only {' or '.join(map(repr, allowed))} has)"
        for key, allowed in wanted.items()
        if found[key] not in allowed
    ]


def read_pieces(folder: Path) -> dict[str, int] | None:
    """The ids of the folder's tokens, by their text; None if it has no tokenizer that can be compared."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = values["model"]["vocab"]
        pieces = dict(vocabulary) if isinstance(vocabulary, dict) else {row[0]: i for i, row in enumerate(vocabulary)}
        return pieces | {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(Problem(str(path), f"cannot be read: {error!r}", "download it again")) from None


def is_zero(source: Source, name: str) -> bool:
    """Whether the folder has no tensor of this name, or one of zeros."""
    return name not in source.files or not torch.count_nonzero(source.tensor(name))
