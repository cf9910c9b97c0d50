"""Continue texts with a trained model: megastruct-generate runs/quickstart --prompt "The file"."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import get_args

from megastruct.console import command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.inference.forms import Form
from megastruct.inference.load import DTYPES, load
from megastruct.inference.sampling import SAMPLING_FIELDS, Sampling, option
from megastruct.inference.text import Text, TextGenerator, refuse_stops
from megastruct.paths import option_path

DEFAULT_PROMPT = "The "


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Load a checkpoint and continue the prompts. A user's mistake exits with code 2."""
    args = _parser().parse_args(argv)
    with user_errors_exit():
        sampling = _check(args)
        prompts = _prompts(args)
        loaded = load(
            args.run,
            args.device,
            DTYPES[args.dtype],
            form=args.form,
            tokenizer=args.tokenizer,
            allow_guided=args.allow_guided,
        )
        # Compiling takes longer than making a few texts does.
        generator = TextGenerator(loaded, compiled=None if args.compile else False)
        refuse_stops(args.stop, args.stop_id, loaded.config.model.vocab_size)
        if args.interactive:
            return _interact(generator, args, sampling)
        show = _Printer(prompts, args.json)
        texts = generator(
            prompts, args.max_new_tokens, sampling, args.stop, args.stop_id, args.batch_size, on_text=show.stream
        )
        show.finish(texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", type=option_path, help="run folder, for example runs/quickstart, or one of its checkpoint folders")
    add("--prompt", action="append", help=f"the text to continue, may be repeated (default: {DEFAULT_PROMPT!r})")
    add("--prompt-file", type=option_path, help='one prompt per line; in a .jsonl file, the "prompt" of each line')
    add("--interactive", action="store_true", help="ask for prompts until the input ends")
    add("--max-new-tokens", type=int, default=40, help="default: %(default)s")
    defaults = Sampling()
    add("--temperature", type=float, default=defaults.temperature, help="0 takes the likeliest (default: %(default)s)")
    add("--top-k", type=int, default=defaults.top_k, help="only the likeliest ones; 0: all (default: %(default)s)")
    add("--top-p", type=float, default=defaults.top_p, help="only the likeliest of this share (default: %(default)s)")
    add("--min-p", type=float, default=defaults.min_p, help="least share of the likeliest's (default: %(default)s)")
    add("--repetition-penalty", type=float, default=defaults.repetition_penalty, help="default: %(default)s")
    add("--seed", type=int, default=defaults.seed, help="+1 for each interactive prompt (default: %(default)s)")
    add("--stop", action="append", default=[], help="a string that ends the text, may be repeated")
    add("--stop-id", type=int, action="append", default=[], help="a token id that ends the text, may be repeated")
    add("--batch-size", type=int, default=16, help="prompts that are continued together (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object per prompt: prompt, text, num_tokens, reason")
    add("--form", choices=get_args(Form), default="structured", help="how structured linears are computed")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="default: %(default)s")
    add("--compile", action="store_true", help="compile the steps on a GPU: slow to start, then faster")
    add("--tokenizer", type=option_path, help="tokenizer file (default: the run's own)")
    add("--allow-guided", action="store_true", help="also load checkpoints from the guided phase")
    add("--device", help="default: the GPU if there is one")
    return parser


class _Printer:
    """Prints a single text while it is made, several when they are complete."""

    def __init__(self, prompts: Sequence[str], as_json: bool) -> None:
        self.as_json, self.streams = as_json, len(prompts) == 1 and not as_json
        self.unprinted = prompts[0] if self.streams else ""

    def stream(self, prompt: int, text: str) -> None:
        if self.streams:
            print(self.unprinted + text, end="", flush=True)
            self.unprinted = ""

    def finish(self, texts: Sequence[Text]) -> None:
        for number, text in enumerate(texts, start=1):
            if self.as_json:
                print(json.dumps(asdict(text), ensure_ascii=False))
            elif self.streams:
                print(self.unprinted)
            else:
                print(f"--- {number}\n{text.prompt}{text.text}")
        full = [number for number, text in enumerate(texts, start=1) if text.reason == "context"]
        if full:
            which = "the text" if len(texts) == 1 else f"text {', '.join(map(str, full))}"
            print(f"{which} ends because the model's context is full", file=sys.stderr)


def _interact(generator: TextGenerator, args: argparse.Namespace, sampling: Sampling) -> None:
    for turn in count():
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)  # ends the line of the question
            return
        show = _Printer([prompt], args.json)
        try:
            drawn = replace(sampling, seed=sampling.seed + turn)  # the same prompt again is continued in another way
            show.finish(generator([prompt], args.max_new_tokens, drawn, args.stop, args.stop_id, on_text=show.stream))
        except UserError as error:  # of this prompt; the next one may do
            print(f"error: {error}", file=sys.stderr)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        prompts += _read_prompts(args.prompt_file)
    return prompts or ([] if args.interactive else [DEFAULT_PROMPT])


def _read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path}: {getattr(error, 'strerror', None) or error}"
        raise UserError(Problem("--prompt-file", found, "a UTF-8 text file with one prompt per line")) from None
    if not text.strip():
        raise UserError(Problem("--prompt-file", f"{path} has no prompt", "one prompt per line"))
    lines = text.removesuffix("\n").split("\n")  # not splitlines: U+2028 and others may stand in a prompt
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)["prompt"]
        if isinstance(found, str):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(Problem(where, "has no text under the key prompt", '{"prompt": "The file"}'))


def _check(args: argparse.Namespace) -> Sampling:
    problems = [
        Problem(name, f"{value} is less than 1", f"{name} {suggestion}")
        for name, value, suggestion in (
            ("--max-new-tokens", args.max_new_tokens, 40),
            ("--batch-size", args.batch_size, 16),
        )
        if value < 1
    ]
    try:
        sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING_FIELDS})
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    if args.interactive and (args.prompt or args.prompt_file):
        given = option("prompt" if args.prompt else "prompt_file")
        problems.append(Problem("--interactive", f"given together with {given}", "one of them"))
    if problems:
        raise UserError(problems)
    return sampling
