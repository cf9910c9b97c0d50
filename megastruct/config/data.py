"""The section `data` of a config: what is trained on, and its tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from megastruct.config.section import MAX_SECONDS, Count, PathText, Section, Size


def _path_kind(value: object) -> str:
    # Not identifiers, so messages leave them out.
    if not isinstance(value, list):
        return "-path"
    return "-paths" if value and all(isinstance(item, str) for item in value) else "-list"


OnePath = Annotated[PathText, Tag("-path")]
Paths = Annotated[list[PathText], Field(min_length=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TextChoice(Section):
    """Which part of a place of text is meant."""

    config: str | None = Field(
        None, description="with data.kind=text: configuration of a dataset, such as `en`. Left out: its only one"
    )
    split: str | None = Field(
        None,
        description="with data.kind=text: split of a dataset, such as `train`. `all` reads every file. Left out: the "
        "only split",
    )
    validation_split: str | None = Field(
        None,
        description="with data.kind=text: split that is held out. Left out: a share of the documents "
        "(data.validation_fraction)",
    )
    include: Annotated[list[PathText] | None, BeforeValidator(_as_list)] = Field(
        None, description="with data.kind=text: pattern or patterns of file names. Left out: all files"
    )


class DataSource(TextChoice):
    """One source of a mixture, with its relative weight; its choices take the place of those of `data`."""

    path: Annotated[OnePath | Annotated[Paths, Tag("-paths")], Discriminator(_path_kind)] = Field(
        description="as data.path, for one source"
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        description="share of the samples, relative to the other sources' weights"
    )

    @property
    def paths(self) -> list[str]:
        """The places of the source."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """The first path with the configuration and the split, which tell sources of one dataset apart."""
        return "/".join(filter(None, (self.paths[0], self.config, self.split)))


class DataConfig(TextChoice):
    """The training data and its tokenizer."""

    kind: Literal["tokens", "text"] = Field(
        description="tokens: shards of token ids, made by tools/prepare_data.py, for full speed from the first step. "
        "text: shards of documents, tokenised during training"
    )
    path: Annotated[
        OnePath | Annotated[Paths, Tag("-paths")] | Annotated[list[DataSource], Field(min_length=1), Tag("-list")],
        Discriminator(_path_kind),
    ] = Field(
        description="tokens: a folder of shards, or .bin/.idx files of Megatron-LM. text: a folder, pattern, file or "
        "dataset name on the hub, or a list of them. Both: an address such as s3://BUCKET/FOLDER. A mixture is a list "
        "of {path, weight}: samples are drawn from each source in proportion to its weight"
    )
    tokenizer: PathText | None = Field(
        None,
        description="SentencePiece model, tokenizer.json, or a folder that has one. Required with data.kind=text and "
        "for files of Megatron-LM; token shards contain a copy, which a given one must equal",
    )
    eod_token: str | None = Field(
        None, description="special token that ends a document. Left out: what the tokenizer's files say"
    )
    bos_token: str | None = Field(
        None,
        description="special token before every document; an empty string: none. Left out: what the tokenizer's files "
        "say, and none for SentencePiece",
    )
    special_tokens_in_text: bool = Field(
        False,
        description="whether text that reads as a special token becomes that token; never the one that ends a document",
    )
    text_column: str | None = Field(
        None, description="with data.kind=text: column that holds the documents. Left out: `content`, or else `text`"
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.005,
        description="with data.kind=text: share of the documents that is held out for validation; token shards have "
        "theirs fixed. Large corpora need less, small ones such as a tutorial's more (0.02)",
    )
    num_streams: Size | None = Field(
        None,
        description="with data.kind=text: streams of shards that are read in turn. Left out: follows from the number "
        "of shards",
    )
    num_workers: Count = Field(
        1,
        description="with data.kind=text: processes per rank that tokenise ahead. 0: a thread of the rank. Take more "
        "if data_wait_seconds in the metrics is not near 0",
    )
    patience_seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = Field(
        300.0, description="how long reading a shard of text, or the mirror of a run, that fails is retried"
    )
    token_cache: PathText | None = Field(
        None,
        description="with data.kind=tokens at an address: folder for the copy that is made before training. Left out: "
        "~/.cache/megastruct/tokens",
    )

    @property
    def places(self) -> list[DataSource]:
        """Every source with its choices; a plain path, or a list of them, is a single source."""
        own = {key: getattr(self, key) for key in TextChoice.model_fields}
        sources = [source for source in self.path if isinstance(source, DataSource)]
        if not sources:
            paths: Any = self.path
            return [DataSource(path=paths, weight=1.0, **own)]
        return [source.model_copy(update={k: own[k] for k in own if not getattr(source, k)}) for source in sources]

    @property
    def sources(self) -> list[tuple[str, float]]:
        """(path, weight) of every source; of several paths the first.

        Where two sources have the same path, the path is followed by what tells them apart.
        """
        firsts = [source.paths[0] for source in self.places]
        return [
            (source.label if firsts.count(source.paths[0]) > 1 else source.paths[0], source.weight)
            for source in self.places
        ]
