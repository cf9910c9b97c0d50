"""Make token shards (see manifest.py) from text shards, with worker processes that take one shard at a time.

Every file is written under a temporary name and renamed; then the shard's record is written to `progress/`. A run that
was killed continues with the shards that have no record. The manifest is written last and replaces `progress/`. The
tokens of a shard depend on the settings and the shard alone, so the bytes are the same for any number of workers.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from megastruct.data.preparation.shard import OutputError, ShardJob, ShardRecord
from megastruct.data.preparation.workers import run_jobs
from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.check import TEXT_COLUMNS, check_shards
from megastruct.data.sources.choice import EVERYTHING, Choice
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.place import Corpus, Place, find_corpus
from megastruct.data.sources.shards import TextShard
from megastruct.data.tokenizers.open import open_tokenizer
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.data.tokens.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Settings,
    SourceRecord,
    Splits,
    TokenizerRecord,
    Totals,
    check_files,
    dtype_for,
    load_manifest,
    total_of,
)
from megastruct.errors import Problem, Problems, UserError
from megastruct.files import FileLock, LockHeldError, write_atomically

DEFAULT_VALIDATION_FRACTION = 0.005
PROGRESS_NAME = "progress"
_LOCK_NAME = ".lock"
_OUR_FILE = re.compile(r"\.?\d{5,}-\d{3,}\.bin(\.writing)?")


def prepare(
    input_path: str | Sequence[str],
    output: Path,
    tokenizer_path: str,
    *,
    text_columns: tuple[str, ...] = TEXT_COLUMNS,
    choice: Choice = EVERYTHING,
    validation_split: str | None = None,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    num_workers: int = 1,
    max_shard_tokens: int = 2**29,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    tokenizer_options: TokenizerOptions | None = None,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Make token shards in `output` from the text shards of `input_path`; a finished folder is left unchanged.

    Args:
        input_path: folder, glob, file or Hugging Face name of text shards, or several of them.
        output: folder of the token shards, which need not exist.
        tokenizer_path: SentencePiece model file, tokenizer.json, or a folder that has one.
        text_columns: names of columns; the first that is there holds the text.
        choice: the configuration, the split and the files that are meant, of every input.
        validation_split: split of every input that is held out, in place of `validation_fraction`.
        validation_fraction: share of the documents to hold out, in [0, 1).
        num_workers: worker processes, at least 1.
        max_shard_tokens: largest number of tokens per file.
        patience_seconds: how long to retry a shard that cannot be reached.
        tokenizer_options: the tokens around a document, and what text may become.
        report: receives each line of progress. A terminal also gets a progress bar on stderr.

    Raises:
        UserError: the input is bad, the output folder holds other files or cannot be written, or a worker process
            died. Finished shards are kept.
    """
    tokenizer = open_tokenizer(tokenizer_path, "--tokenizer", tokenizer_options)
    paths = [input_path] if isinstance(input_path, str) else input_path
    places = [Place(path, "--input", choice, text_columns) for path in paths]
    corpus = find_corpus(places, validation_split, patience_seconds)
    shards = [*corpus.shards, *corpus.held_out_shards]
    for line in corpus.lines():
        report(line)
    settings = _settings(tokenizer, corpus, validation_fraction, max_shard_tokens)
    _refuse_other_contents(output)
    if done := _finished_before(output, settings, report):  # nothing is locked or written for it
        return done
    check_shards(shards, patience_seconds)  # before the folder is made: a refusal leaves none behind
    with _output_errors(output), _locked(output):
        if done := _finished_before(output, settings, report):
            return done
        _begin(output, tokenizer, settings)
        jobs = _jobs(output, tokenizer, shards, settings, patience_seconds)
        manifest = _manifest(settings, _make_shards(jobs, num_workers, report))
        _remove_leftovers(output, manifest)
        write_atomically(output / MANIFEST_NAME, _json_of(manifest) + b"\n")
        shutil.rmtree(output / PROGRESS_NAME)
    report(f"done: {_summary(output, manifest)}")
    return manifest


def _finished_before(output: Path, settings: Settings, report: Callable[[str], None]) -> Manifest | None:
    """The manifest of a finished folder. Raises UserError if it is damaged or was made with other settings."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    manifest = load_manifest(output)
    _refuse_other_settings(output, manifest.settings, settings)
    check_files(output, manifest)
    shutil.rmtree(output / PROGRESS_NAME, ignore_errors=True)
    report(f"already done: {_summary(output, manifest)}")
    return manifest


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn errors of writing into `OutputError`; errors of reading have become messages before."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError.of(Path(error.filename or output), error) from None


def _settings(tokenizer: Tokenizer, corpus: Corpus, validation_fraction: float, max_shard_tokens: int) -> Settings:
    column = corpus.shards[0].text_column
    sources = [
        SourceRecord(
            name=shard.name,
            num_bytes=shard.num_bytes,
            text_column=shard.text_column if shard.text_column != column else None,
            held_out=held_out,
        )
        for shards, held_out in ((corpus.shards, False), (corpus.held_out_shards, True))
        for shard in shards
    ]
    return Settings(
        tokenizer=TokenizerRecord(
            file=tokenizer.file_name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        ),
        text_column=column,
        validation_fraction=0.0 if corpus.held_out else validation_fraction,
        max_shard_tokens=max_shard_tokens,
        sources=tuple(sources),
    )


def _refuse_other_contents(output: Path) -> None:
    """Raise UserError if `output` holds files that this tool did not write."""
    if output.exists() and not output.is_dir():
        raise UserError(Problem("--output", f"{output} is not a folder", "give a folder, which need not exist"))
    if output.is_dir():
        ours = {MANIFEST_NAME, PROGRESS_NAME, _LOCK_NAME}
        names = {path.name for path in output.iterdir()}
        if names and not names & ours:
            found = f"{output} holds other files ({', '.join(sorted(names)[:5])})"
            raise UserError(Problem("--output", found, "give an empty folder, or one that does not exist"))


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep a second run out of the same folder; the system frees the lock of a run that was killed."""
    try:
        lock = FileLock(output / _LOCK_NAME, temporary=True)
    except LockHeldError:
        found = f"another run is writing to {output}"
        raise UserError(Problem("--output", found, "wait for it, or give another folder")) from None
    if lock.warning:
        print(f"warning: {lock.warning}", file=sys.stderr, flush=True)
    with lock:
        yield


def _refuse_other_settings(output: Path, old: Settings, new: Settings) -> None:
    problems = Problems()
    suggestion = "give the same settings, or another --output"
    for key in ("text_column", "validation_fraction", "max_shard_tokens"):
        before, now = getattr(old, key), getattr(new, key)
        if before != now:
            option = "--" + key.replace("_", "-")
            problems.append(Problem(option, f"is {now}, but {output} was made with {before}", suggestion))
    if old.tokenizer != new.tokenizer:
        found = (
            f"{output} was made with another tokenizer ({old.tokenizer.vocab_size:,} ids, end-of-document id "
            f"{old.tokenizer.eod_id}, sha256 {old.tokenizer.fingerprint[:12]}...)"
        )
        problems.append(Problem("--tokenizer", found, suggestion))
    if old.sources != new.sources:
        found = f"{output} was made from {len(old.sources)} shards that differ from the {len(new.sources)} given now"
        differing = sorted({source.name for source in set(old.sources) ^ set(new.sources)})
        problems.append(Problem("--input", f"{found} (differing: {', '.join(differing[:5])})", suggestion))
    problems.raise_if_any()


def _begin(output: Path, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write the settings, or compare them with those of the run that is being continued."""
    path = output / PROGRESS_NAME / "settings.json"
    if path.is_file():
        begun = Settings.model_validate_json(path.read_bytes())
        replaced: list[int] = []
        if [source.name for source in begun.sources] == [source.name for source in settings.sources]:
            pairs = enumerate(zip(begun.sources, settings.sources, strict=True))
            replaced = [index for index, (before, now) in pairs if before != now]
            begun = begun.model_copy(update={"sources": settings.sources})
        _refuse_other_settings(output, begun, settings)
        for index in replaced:  # made again, even if its modification time is that of the old one
            _record_path(output, index).unlink(missing_ok=True)
    for folder in (PROGRESS_NAME, *SPLITS):
        (output / folder).mkdir(exist_ok=True)
    write_atomically(path, _json_of(settings))
    for name, content in tokenizer.files.items():
        write_atomically(output / name, content)


def _json_of(record: Manifest | Settings) -> bytes:
    """Without what has its default value, so that the file says only what is special about it."""
    return record.model_dump_json(indent=1, exclude_defaults=True).encode()


def _record_path(output: Path, index: int) -> Path:
    return output / PROGRESS_NAME / f"{index:05d}.json"


def _jobs(
    output: Path, tokenizer: Tokenizer, shards: list[TextShard], settings: Settings, patience_seconds: float
) -> list[ShardJob]:
    return [
        ShardJob(
            index=index,
            shard=shard,
            output=output,
            record_path=_record_path(output, index),
            tokenizer=tokenizer,
            validation_fraction=1.0 if source.held_out else settings.validation_fraction,
            max_shard_tokens=settings.max_shard_tokens,
            dtype=dtype_for(settings.tokenizer.vocab_size),
            patience_seconds=patience_seconds,
        )
        for index, (shard, source) in enumerate(zip(shards, settings.sources, strict=True))
    ]


def _make_shards(jobs: list[ShardJob], num_workers: int, report: Callable[[str], None]) -> list[ShardRecord]:
    records = {job.index: record for job in jobs if (record := _finished(job))}
    if records:
        report(f"continuing an interrupted run: {len(records)} of {len(jobs)} shards are done")
    records |= run_jobs([job for job in jobs if job.index not in records], num_workers, report)
    return [records[index] for index in range(len(jobs))]


def _finished(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that an earlier run finished; None if its files are incomplete or the shard has changed."""
    try:
        record = ShardRecord.model_validate_json(job.record_path.read_bytes())
        if record.source_version != job.source_version():
            return None
    except (OSError, ValidationError):
        return None
    for split in SPLITS:
        for file in getattr(record.splits, split):
            path = job.output / file.file
            if not path.is_file() or os.path.getsize(path) != file.num_bytes:
                return None
    return record


def _remove_leftovers(output: Path, manifest: Manifest) -> None:
    """Remove token files that are not in the manifest, left by a killed run from a shard that has changed since."""
    for split in SPLITS:
        listed = {file.file for file in getattr(manifest.splits, split)}
        for path in (output / split).iterdir():
            if f"{split}/{path.name}" not in listed and _OUR_FILE.fullmatch(path.name):
                path.unlink()


def _manifest(settings: Settings, records: list[ShardRecord]) -> Manifest:
    files = {split: tuple(file for record in records for file in getattr(record.splits, split)) for split in SPLITS}
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped_documents)
    return Manifest(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        dtype=dtype_for(settings.tokenizer.vocab_size),
        settings=settings,
        splits=Splits(**files),
        totals=Totals(**{split: total_of(files[split]) for split in SPLITS}),
        skipped_documents=dict(sorted(skipped.items())),
    )


def _summary(output: Path, manifest: Manifest) -> str:
    totals, skipped = manifest.totals, manifest.skipped_documents
    text = (
        f"{output}: {totals.train.num_tokens:,} training tokens in {totals.train.num_documents:,} documents, "
        f"{totals.validation.num_tokens:,} held-out tokens in {totals.validation.num_documents:,}"
    )
    if any(skipped.values()):
        text += f"; skipped {', '.join(f'{count:,} {reason}' for reason, count in skipped.items() if count)}"
    return text
