"""The part of a run's config that its data depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megastruct.config.schema import Config, DataConfig
from megastruct.data.mixture import Mixture
from megastruct.data.tokenizers.options import TokenizerOptions


def tokenizer_options_of(data: DataConfig) -> TokenizerOptions:
    """What the config's section `data` chooses of the tokenizer."""
    return TokenizerOptions(data.eod_token, data.bos_token, data.special_tokens_in_text or None)


@dataclass(frozen=True)
class DataOptions:
    """The config's section `data`, and the few values of other sections that the data depends on.

    Relative paths are relative to the current directory.

    Raises:
        ValueError: `seq_length` is less than 1.
    """

    data: DataConfig
    seq_length: int  # tokens per sample, not counting the last label; at least 1
    vocab_size: int  # the model's; at least the tokenizer's
    seed: int  # of the data order
    cache_folder: Path | None = None  # for results that take long to find (cache.py); needs an existing parent folder
    hub_commits: Sequence[str | None] = ()  # commit of each path, used if the cache has none

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}")

    @classmethod
    def of(
        cls, config: Config, cache_folder: Path | None = None, hub_commits: Sequence[str | None] = ()
    ) -> DataOptions:
        """The options of a run with this config."""
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
        """(key in the config, path as written) of every source."""
        if isinstance(self.data.path, str):
            return [("data.path", self.data.path)]
        return [(f"data.path.{index}", source.path) for index, source in enumerate(self.data.path)]

    @property
    def mixture(self) -> Mixture:
        """The interleave of the sources, in the order of `paths`."""
        return Mixture([weight for _, weight in self.data.sources], [path for path, _ in self.data.sources])

    @property
    def tokenizer_options(self) -> TokenizerOptions:
        """What the config chooses of the tokenizer."""
        return tokenizer_options_of(self.data)

    @property
    def tokenizer_path(self) -> Path | None:
        """The absolute path of `data.tokenizer`; None if it is not set."""
        return Path(self.data.tokenizer).expanduser().absolute() if self.data.tokenizer else None
