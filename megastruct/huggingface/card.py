"""The model card of an exported folder, README.md: what the run folder says about the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastruct.config.schema import Config
from megastruct.planning.cost import ffn_parameters, mean_guide_share, total_parameters, training_flops_per_token
from megastruct.planning.steps import guided_steps, total_steps

_COUNTS = {"num_train_tokens": "training tokens", "num_shards": "shards", "num_bytes": "bytes"}


def model_card(run: Path, step: int, config: Config, form: str, architecture: str, dtype: str, version: str) -> str:
    """The text of README.md for the checkpoint of `step` in the folder `run`.

    `form`: merged or structured. `version`: of megastruct. What the run folder does not contain is left out.
    """
    environment = _read_json(run / "environment.json")
    results = _last_results(run / "metrics.jsonl", step)
    facts = {
        "class": f"`{architecture}`" + ("" if form == "merged" else " (in this folder, `trust_remote_code=True`)"),
        "weights": f"{dtype}, from float32 master weights",
        **_model_facts(config, form),
        "steps": f"{step:,} of {total_steps(config):,}",
        "tokens": f"{config.training.tokens(step):,}",
        **({"training loss": f"{results['loss']:.4f}"} if "loss" in results else {}),
        **({"validation loss": f"{results['validation_loss']:.4f}"} if "validation_loss" in results else {}),
        "training FLOPs": f"{training_flops(config, step):.3e} (matrix products, forward and backward)",
        "context": f"{config.training.seq_length:,} tokens",
        **_data_facts(_read_json(run / "data.json"), config),
        **({"trained with": _trained_with(environment)} if environment else {}),
        "exported with": f"megastruct {version}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    trust = ", trust_remote_code=True" if form == "structured" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [megastruct, {config.ffn.structure}]
---

# {config.run.name}

A language model trained from scratch with megastruct, exported in its {form} form.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(ids[0]))
```

{_documents_note(config)}
"""


def training_flops(config: Config, step: int) -> float:
    """FLOPs of the first `step` steps; guides count for the mean share of tokens that they see."""
    guided = min(step, guided_steps(config))
    per_token = (training_flops_per_token(config, mean_guide_share(config)), training_flops_per_token(config))
    tokens = config.training.tokens(guided)
    return tokens * per_token[0] + (config.training.tokens(step) - tokens) * per_token[1]


def _model_facts(config: Config, form: str) -> dict[str, str]:
    model, ffn = config.model, config.ffn
    sizes = ", ".join(f"{name} {value}" for name, value in ffn.sizes.items())
    first = ", dense in the first layer" if not ffn.is_dense and ffn.dense_first_block else ""
    merged = ", multiplied out to dense" if form == "merged" and not ffn.is_dense else ""
    structure = f"{ffn.structure}{f' ({sizes})' if sizes else ''}{first}{merged}"
    return {
        "parameters as trained": f"{total_parameters(config):,}",
        "feed-forward weights as trained": f"{ffn_parameters(config):,}",
        "feed-forward layers": structure,
        "layers, hidden size, heads": f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}",
    }


def _data_facts(data: Mapping[str, Any], config: Config) -> dict[str, str]:
    sources = config.data.sources
    weights = [f" (weight {weight:g})" if len(sources) > 1 else "" for _, weight in sources]
    paths = ", ".join(f"`{path}`{weight}" for (path, _), weight in zip(sources, weights, strict=True))
    counts = [f"{data[key]:,} {name}" for key, name in _COUNTS.items() if isinstance(data.get(key), int)]
    commits = [str(commit) for commit in data.get("hub_commits", []) if commit]
    pinned = [f"commit {', '.join(commits)} on the hub"] if commits else []
    return {"data": "; ".join([paths, *counts, *pinned])}


def _trained_with(environment: Mapping[str, Any]) -> str:
    versions = [f"{name} {environment[name]}" for name in ("megastruct", "torch", "deepspeed") if name in environment]
    commit = environment.get("git_commit", "unknown")
    return ", ".join([*versions, f"commit {commit}"])


def _documents_note(config: Config) -> str:
    packed = "Documents were packed into rows without padding. Each ended with the `eos_token`, which is the "
    packed += "`bos_token` as well; the tokenizer adds neither to a text."
    if config.training.document_attention == "crossed":
        return f"{packed} In training, a token attended to all earlier tokens of its row, also across documents."
    return (
        f"{packed} In training, a token attended to its own document only. One document per row is computed as in "
        "training; for several documents in a row, pass `position_ids` that start again at 0 after each `eos_token`, "
        "and no `attention_mask`. Otherwise tokens attend across documents, and the outputs differ."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _last_results(path: Path, step: int) -> dict[str, float]:
    """The newest value of each metric up to `step`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        if record.get("step", step + 1) <= step:
            found |= {key: value for key, value in record.items() if isinstance(value, int | float)}
    return found
