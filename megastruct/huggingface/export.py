"""Export a trained run as a folder for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megastruct.config.schema import Config
from megastruct.data import Tokenizer
from megastruct.huggingface.card import model_card
from megastruct.huggingface.folder import check_output, new_folder, write_weights
from megastruct.huggingface.merged import merged_tensors
from megastruct.huggingface.stock import stock_config, variant_of
from megastruct.huggingface.structured import check_structured, modeling_file, structured_config
from megastruct.huggingface.tokenizer import write_tokenizer
from megastruct.inference.load import DTYPES
from megastruct.models.gpt import GPT

Form = Literal["merged", "structured"]
FORMS: tuple[Form, ...] = ("merged", "structured")


@dataclass(frozen=True)
class Trained:
    """A trained model in float32 on the CPU, with its tokenizer, and the run folder and step that it comes from."""

    run: Path
    step: int
    model: GPT
    tokenizer: Tokenizer
    config: Config


@dataclass(frozen=True)
class Exported:
    """What was written: the class that loads it, and the number of its parameters."""

    architecture: str
    num_parameters: int


def check_form(config: Config, form: Form) -> None:
    """Raises UserError with the reason if this form cannot hold the model exactly."""
    if form == "merged":
        variant_of(config)
    else:
        check_structured(config)


def export(trained: Trained, output: Path, form: Form = "merged", dtype: str = "float32") -> Exported:
    """Write the folder `output`: weights, config, generation config, tokenizer and model card.

    `form`: "merged" multiplies the structures out and needs no code of this project; "structured" keeps the factors.
    `dtype`: of the stored weights, a key of DTYPES.

    Raises:
        UserError: the form cannot hold the model exactly, transformers would give other token ids, `output` is not
            empty, or the disk refuses it. Nothing is left behind.
    """
    config, tokenizer = trained.config, trained.tokenizer
    check_output(output)
    check_form(config, form)
    tensors: Iterable[tuple[str, Tensor]]
    if form == "merged":
        variant = variant_of(config)
        tensors, values = merged_tensors(trained.model, config, variant), stock_config(config, variant)
    else:
        tensors, values = trained.model.named_parameters(), structured_config(config)
    values |= _token_ids(tokenizer) | {"use_cache": True, "dtype": dtype}
    architecture = values["architectures"][0]
    with new_folder(output) as folder:
        write_tokenizer(folder, tokenizer, config.training.seq_length)
        (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(_generation(tokenizer, config), indent=2))
        card = model_card(trained.run, trained.step, config, form, architecture, dtype, version("megastruct"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if form == "structured":
            shutil.copyfile(modeling_file(), folder / modeling_file().name)
        converted = {name: tensor.detach().to(DTYPES[dtype]).contiguous() for name, tensor in tensors}
        write_weights(folder, converted)
    return Exported(architecture, sum(tensor.numel() for tensor in converted.values()))


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """A text begins after the end of the document before it, unless documents begin with a token of their own."""
    bos_id = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    return {"bos_token_id": bos_id, "eos_token_id": tokenizer.eod_id}


def _generation(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    without_piece = list(range(tokenizer.vocab_size, config.model.vocab_size))
    return {
        **_token_ids(tokenizer),
        "pad_token_id": tokenizer.eod_id,
        **({"suppress_tokens": without_piece} if without_piece else {}),
    }
