"""What opening data needs to know of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megastruct.config.schema import Config, DataConfig


@dataclass(frozen=True)
class DataOptions:
    """A run's section `data`, and the few values of others that data depends on.

    Relative paths start at the current directory.
    """

    data: DataConfig
    seq_length: int  # tokens per sample without the last label, at least 1
    vocab_size: int  # the model's; at least the tokenizer's
    seed: int  # of the data order
    cache_folder: Path | None = None  # keeps what takes long to find (cache.py); not made without the folder above it
    hub_commits: Sequence[str | None] = ()  # of each path, the one that it stands for if the cache has none

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}")

    @classmethod
    def of(
        cls, config: Config, cache_folder: Path | None = None, hub_commits: Sequence[str | None] = ()
    ) -> DataOptions:
        return cls(
            config.data,
            seq_length=config.training.seq_length,
            vocab_size=config.model.vocab_size,
            seed=config.run.seed,
            cache_folder=cache_folder,
            hub_commits=hub_commits,
        )

    @property
    def paths(self) -> list[tuple[str, str]]:
        """(its key in the config, path as it is written) of every source."""
        if isinstance(self.data.path, str):
            return [("data.path", self.data.path)]
        return [(f"data.path.{index}", source.path) for index, source in enumerate(self.data.path)]

    @property
    def weights(self) -> list[float]:
        """Of every source."""
        return [weight for _, weight in self.data.sources]

    @property
    def tokenizer_path(self) -> Path | None:
        return Path(self.data.tokenizer).expanduser().absolute() if self.data.tokenizer else None
