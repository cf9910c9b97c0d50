"""Continue a text with a trained model: megastruct-generate runs/quickstart --prompt "The file"."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megastruct.data import open_tokenizer
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.inference.generate import generate
from megastruct.inference.load import load_model


def main(argv: Sequence[str] | None = None) -> None:
    """Load a run's newest checkpoint and print the continuation of --prompt. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, for example runs/quickstart")
    parser.add_argument("--prompt", default="The ", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always picks the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=40, help="sample from this many likeliest tokens (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model file (default: the run's own)")
    parser.add_argument("--allow-guided", action="store_true", help="also load checkpoints from the guided phase")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with user_errors_exit():
        _check(args)
        model, config = load_model(args.run, args.device, allow_guided=args.allow_guided)
        tokenizer = open_tokenizer(args.tokenizer or args.run / "tokenizer.model")
        prompt = torch.from_numpy(tokenizer.encode([args.prompt])[0].astype("int64")).to(args.device)
        if not 0 < len(prompt) < config.training.seq_length:
            found = f"has {len(prompt)} tokens, but prompt and continuation must fit into {config.training.seq_length}"
            raise UserError(Problem("--prompt", found, '--prompt "The "'))
        ids = generate(
            model,
            prompt,
            min(args.max_new_tokens, config.training.seq_length - len(prompt)),
            eod_id=tokenizer.eod_id,
            temperature=args.temperature,
            top_k=args.top_k,
            seed=args.seed,
        )
        print(tokenizer.decode(ids.tolist()))


def _check(args: argparse.Namespace) -> None:
    problems = [
        Problem(option, f"{value} is less than {least}", f"{option} {least} or more")
        for option, value, least in (
            ("--max-new-tokens", args.max_new_tokens, 1),
            ("--temperature", args.temperature, 0),
            ("--top-k", args.top_k, 1),
        )
        if value < least
    ]
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(Problem("--device", f"{args.device} is given, but PyTorch finds no GPU", "--device cpu"))
    if problems:
        raise UserError(problems)
