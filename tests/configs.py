"""Small configs for tests."""

from __future__ import annotations

from typing import Any

from megastruct.config.schema import Config


def tiny_config(**sections: dict[str, Any]) -> Config:
    """A model of 4 blocks that trains in milliseconds; keyword arguments change keys: `parallel={"pp": 2}`."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny"},
        "model": {
            "hidden_size": 16,
            "num_layers": 4,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "vocab_size": 64,
            "init_std": 0.2,
        },
        "ffn": {"structure": "lowrank", "rank": 8},
        "data": {"kind": "tokens", "path": "unused"},
        "training": {
            "seq_length": 8,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "num_steps": 20,
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 1e-2, "gradient_clipping": 0.5},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return Config.model_validate(values)
