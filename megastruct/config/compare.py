"""Decides which changes of a config let a run continue in its folder, and which make it another run."""

from __future__ import annotations

from megastruct.config.schema import Config

# Where and how fast the run trains, and how often it evaluates and saves. None of it changes what is trained.
FREE_SECTIONS = ("parallel", "evaluation", "logging", "checkpoint", "hardware", "reliability")
FREE_KEYS = (
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.compile",
    "run.folder",
    "data.path",  # from here on: data is compared by its description instead
    "data.tokenizer",
    "data.text_column",
    "data.config",
    "data.split",
    "data.validation_split",
    "data.include",
    "data.validation_fraction",
    "data.num_streams",
    "data.num_workers",
    "data.patience_seconds",
)


def changes_of_the_run(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(key, old value, new value) of every key whose change makes `new` another run than `old`."""
    changes = []
    old_values, new_values = old.model_dump(), new.model_dump()
    for section, values in new_values.items():
        if section in FREE_SECTIONS:
            continue
        for key in values | old_values[section]:  # structures differ in their sizes
            path, before, value = f"{section}.{key}", old_values[section].get(key), values.get(key)
            if path not in FREE_KEYS and value != before:
                changes.append((path, before, value))
    return changes
