"""Export a trained run for Hugging Face's transformers: megastruct-export runs/quickstart exported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megastruct.checkpoint.intact import newest_of_right_size
from megastruct.checkpoint.store import step_of
from megastruct.data import open_tokenizer
from megastruct.errors import user_errors_exit
from megastruct.huggingface.export import DTYPES, FORMS, Trained, export
from megastruct.huggingface.folder import check_output
from megastruct.inference.load import load_model


def main(argv: Sequence[str] | None = None) -> None:
    """Load a checkpoint and write the folder. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, for example runs/quickstart, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="folder to be made; it may exist if it is empty")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="merged",
        help="merged: structures multiplied out, a class of transformers; structured: factors kept, with a file of "
        "code (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--allow-guided", action="store_true", help="also export checkpoints from the guided phase")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model file (default: the run's own)")
    args = parser.parse_args(argv)
    with user_errors_exit():
        check_output(args.output)
        trained = _load(args.run, args.tokenizer, args.allow_guided)
        exported = export(trained, args.output, args.form, args.dtype)
    size = f"{exported.num_parameters:,} parameters in {args.dtype}"
    print(f"{args.output}: {exported.architecture} with {size}, from step {trained.step}")


def _load(path: Path, tokenizer: Path | None, allow_guided: bool) -> Trained:
    model, config = load_model(path, allow_guided=allow_guided)
    newest = newest_of_right_size(path / "checkpoints")
    assert newest, "load_model has loaded it"
    opened = open_tokenizer(tokenizer or path / "tokenizer.model", "--tokenizer" if tokenizer else "")
    return Trained(path, step_of(newest), model, opened, config)
