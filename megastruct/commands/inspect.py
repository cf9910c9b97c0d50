"""Show the contents of a folder of token shards, or verify it.

megastruct-inspect tokens/                 show counts, document lengths, and a few documents as text
megastruct-inspect tokens/ --verify        also read every file and check sizes, checksums, document counts and ids
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megastruct.console import command
from megastruct.data.preparation.inspect import Lengths, lengths, sample_documents, verify
from megastruct.data.sources.fsspec_address import is_address
from megastruct.data.tokens.fetch import fetch_folder
from megastruct.data.tokens.manifest import SPLITS, Manifest, TokenFile, check_files, load_manifest
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.paths import option_text

BAR_WIDTH = 40


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`, or `sys.argv` if it is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=option_text, help="folder made by megastruct-prepare, or its address (s3://...)")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with the manifest")
    parser.add_argument(
        "--samples", type=int, default=3, help="number of documents to show as text (default: %(default)s)"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="split of lengths and samples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed that selects the samples (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=10**8, help="tokens to read for the lengths (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=4, help="files that --verify reads at once (default: %(default)s)"
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the contents of a folder of token shards. A user's mistake or a damaged file exits with code 2."""
    arguments = parse_arguments(argv)
    with user_errors_exit():
        check_arguments(arguments)
        address = is_address(arguments.folder)
        folder = fetch_folder(arguments.folder, "FOLDER") if address else Path(arguments.folder)
        manifest = load_manifest(folder)
        print_counts(folder, manifest)
        if arguments.verify:
            print_verified(folder, manifest, arguments.workers)
        else:
            check_files(folder, manifest)
        print_lengths(lengths(folder, manifest, arguments.split, arguments.max_tokens), arguments.split)
        documents = sample_documents(folder, manifest, arguments.split, arguments.samples, arguments.seed)
        for file, start, text in documents:
            print(f"\n--- {file}, token {start}\n{text}")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for every number that is too small."""
    problems = [
        Problem(f"--{name.replace('_', '-')}", f"{getattr(arguments, name)} is less than {least}", f"{least} or more")
        for name, least in (("samples", 0), ("seed", 0), ("max_tokens", 1), ("workers", 1))
        if getattr(arguments, name) < least
    ]
    if problems:
        raise UserError(problems)


def print_counts(folder: Path, manifest: Manifest) -> None:
    """Print what the manifest says: sources, tokenizer, size of each split, skipped documents."""
    settings = manifest.settings
    num_bytes = sum(source.num_bytes for source in settings.sources)
    print(f"{folder}: {manifest.dtype} tokens from {len(settings.sources):,} text shards ({num_bytes / 1e9:,.2f} GB)")
    tokenizer = settings.tokenizer
    print(
        f"tokenizer: {tokenizer.vocab_size:,} ids, end-of-document id {tokenizer.eod_id}, "
        f"sha256 {tokenizer.fingerprint}"
    )
    for split in SPLITS:
        files, total = getattr(manifest.splits, split), getattr(manifest.totals, split)
        mean = total.num_tokens / max(1, total.num_documents)
        print(
            f"{split}: {total.num_tokens:,} tokens in {total.num_documents:,} documents (mean {mean:,.1f}), "
            f"{len(files):,} files, {sum(file.num_bytes for file in files) / 1e9:,.2f} GB"
        )
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped_documents.items() if count)
    print(f"skipped: {skipped or 'no documents'}")


def print_verified(folder: Path, manifest: Manifest, num_workers: int) -> None:
    """Read every file with `num_workers` threads and compare it with the manifest.

    Raises:
        UserError: with every file that differs.
    """
    files = [file for split in SPLITS for file in getattr(manifest.splits, split)]
    num_bytes = sum(file.num_bytes for file in files)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:

        def count(file: TokenFile) -> None:
            bar.update(file.num_bytes)

        problems = verify(folder, manifest, num_workers, count)
    if problems:
        verb = "does" if len(problems) == 1 else "do"
        raise UserError(problems, headline=f"{len(problems)} of {len(files)} files {verb} not match the manifest")
    print(f"verified: {len(files):,} files, {num_bytes / 1e9:,.2f} GB: sizes, sha256, document counts, ids")


def print_lengths(found: Lengths, split: str) -> None:
    """Print a histogram of document lengths in tokens, one row per power of two."""
    print(
        f"\nlengths of {found.num_documents:,} {split} documents ({found.num_tokens:,} tokens read): "
        f"mean {found.mean:,.1f}, longest {found.longest:,} tokens"
    )
    most = max(found.counts, default=0)
    for power, count in enumerate(found.counts.tolist()):
        if found.counts[:power].any() or count:
            bar = "#" * round(BAR_WIDTH * count / most)
            print(f"{2**power:>12,} - {2 ** (power + 1) - 1:<12,} {count:>12,}  {bar}".rstrip())
