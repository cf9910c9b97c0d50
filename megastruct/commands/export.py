"""Export a trained run for Hugging Face's transformers: megastruct-export runs/quickstart exported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megastruct.console import command
from megastruct.errors import user_errors_exit
from megastruct.huggingface.export import FORMS, Trained, export
from megastruct.huggingface.folder import check_output
from megastruct.inference.load import DTYPES, load
from megastruct.paths import option_path
from megastruct.run.find import run_of


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Load a checkpoint and write the folder. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=option_path, help="run folder, for example runs/quickstart, or one of its checkpoints"
    )
    parser.add_argument("output", type=option_path, help="folder to be made; it may exist if it is empty")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="merged",
        help="merged: structures multiplied out, a class of transformers; structured: factors kept, with a file of "
        "code (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--allow-guided", action="store_true", help="also export checkpoints from the guided phase")
    parser.add_argument("--tokenizer", type=option_path, help="tokenizer file (default: the run's own)")
    args = parser.parse_args(argv)
    with user_errors_exit():
        check_output(args.output)
        loaded = load(args.run, "cpu", tokenizer=args.tokenizer, allow_guided=args.allow_guided)
        trained = Trained(run_of(args.run), loaded.step, loaded.model, loaded.tokenizer, loaded.config)
        exported = export(trained, args.output, args.form, args.dtype)
    size = f"{exported.num_parameters:,} parameters in {args.dtype}"
    print(f"{args.output}: {exported.architecture} with {size}, from step {trained.step}")
