"""The model card of an exported folder, README.md: what the run folder says about the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastruct.config.schema import Config
from megastruct.errors import UserError
from megastruct.metrics.records import FLOPS, read_runs
from megastruct.planning.cost import ffn_parameters, total_parameters
from megastruct.planning.steps import guided_steps, total_steps
from megastruct.run.origin import origin
from megastruct.run.run_folder import ENVIRONMENT_FILE, read_description, read_record

_COUNTS = {"num_train_tokens": "training tokens", "num_shards": "shards", "num_bytes": "bytes"}


def model_card(run: Path, step: int, config: Config, form: str, architecture: str, dtype: str, version: str) -> str:
    """The text of README.md for the checkpoint of `step` in the folder `run`.

    `form`: merged or structured. `version`: of megastruct. What the run folder does not contain is left out.
    """
    environment, results = read_record(run / ENVIRONMENT_FILE), _last_results(run, step)
    facts = {
        "class": f"`{architecture}`" + ("" if form == "merged" else " (in this folder, `trust_remote_code=True`)"),
        "weights": f"{dtype}, from float32 master weights",
        **_model_facts(config, form),
        "steps": f"{step:,} of {total_steps(config):,}",
        "tokens": f"{config.training.tokens(step):,}",
        **({"training loss": f"{results['loss']:.4f}"} if "loss" in results else {}),
        **({"validation loss": f"{results['validation_loss']:.4f}"} if "validation_loss" in results else {}),
        **(
            {"training FLOPs": f"{results[FLOPS]:.3e} (matrix products, forward and backward)"}
            if FLOPS in results
            else {}
        ),
        "context": f"{config.training.seq_length:,} tokens",
        **_data_facts(read_description(run), config),
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

A language model trained {_beginning(run)} with megastruct, exported in its {form} form.
{_guided_note(config, step)}
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


def _beginning(run: Path) -> str:
    began = origin(run)
    if began is None:
        return "from scratch"
    if began.get("kind") == "run":
        return f"from step {began.get('step'):,} of the run `{Path(str(began.get('folder'))).name}`"
    return f"from the weights of `{began.get('folder')}`"


def _guided_note(config: Config, step: int) -> str:
    guided = guided_steps(config)
    if step >= guided:
        return ""
    return (
        f"\nThe checkpoint is from inside the guided phase (step {step:,} of {guided:,}): while it was trained, dense "
        "guides, which are not in this folder, produced part of the output. The losses below include them.\n"
    )


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


def _last_results(run: Path, step: int) -> dict[str, float]:
    """The newest value of each metric up to `step`, and the training FLOPs."""
    try:
        [records] = read_runs([str(run)])
    except UserError:  # there are none
        return {}
    found: dict[str, float] = {}
    for record in records.records:
        if record.get("step", step + 1) <= step:
            found |= {key: value for key, value in record.items() if isinstance(value, int | float)}
    flops = records.value({**found, "step": step}, FLOPS)
    return found | ({} if flops is None else {FLOPS: flops})
