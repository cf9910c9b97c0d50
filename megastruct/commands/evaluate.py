"""Measure a trained model: its loss on token shards or text, or the tasks of lm-evaluation-harness.

megastruct-evaluate runs/quickstart                                     the run's own held-out data
megastruct-evaluate runs/quickstart --data tokens/ wiki=wiki.jsonl      token shards and text; NAME=PATH names a source
megastruct-evaluate runs/quickstart --tasks lambada_openai,piqa         tasks (needs the extra lm-eval)
torchrun --nproc-per-node 8 tools/evaluate.py runs/quickstart           on several GPUs, with the same result
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

from megastruct.checkpoint.agreement import together
from megastruct.console import command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.evaluation.loss import evaluate
from megastruct.evaluation.model import open_model
from megastruct.evaluation.report import as_json, table
from megastruct.evaluation.sources import Selection, Sources, Split
from megastruct.evaluation.tasks import Tasks, task_table, tasks_as_json
from megastruct.inference.load import DTYPES, Loaded, available_device
from megastruct.launch.environment import Process, current_process, take_share_of_cores
from megastruct.paths import option_path
from megastruct.run.find import run_of


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print a table or, with --json, one JSON object. A user's mistake exits with code 2."""
    args = _parser().parse_args(argv)
    process = current_process()
    with user_errors_exit(print_message=process.local_rank == 0):  # the same on all ranks of a node
        _check(args)
        tasks = Tasks(args.tasks.split(","), args.include_path) if args.tasks is not None else None
    with user_errors_exit(rank=process.rank):
        text = _measure(args, _join(process, args.device), tasks)
        if process.world_size > 1:
            _distributed().leave()
    if process.rank == 0:
        print(text)


def _measure(args: argparse.Namespace, device: torch.device, tasks: Tasks | None) -> str:
    dtype, keys = DTYPES[args.dtype], {"allow_guided": args.allow_guided, "tokenizer": args.tokenizer}
    loaded = together(lambda: open_model(args.run, device, dtype, **keys))
    model = {"run": str(args.run), "step": loaded.step}
    if tasks:
        results = tasks.run(loaded, args.batch_size, args.num_fewshot, args.limit)
        return (tasks_as_json(model, results) if args.json else task_table(results)) if results else ""
    selection = Selection(args.split, args.max_tokens, args.text_column)
    found = Sources(run_of(args.run), loaded, selection)
    sources = together(lambda: found.given(args.data) if args.data else found.own())
    scores = {source.name: evaluate(loaded, source, args.batch_size) for source in sources}
    return as_json(model, scores) if args.json else f"{_described(args.run, loaded)}\n{table(scores)}"


def _described(run: Path, loaded: Loaded) -> str:
    return f"{run}: step {loaded.step}, {next(loaded.model.parameters()).dtype}".replace("torch.", "")


def _join(process: Process, wanted: str | None) -> torch.device:
    """This rank's device, after all ranks have met if there are several."""
    device = available_device(wanted)
    if device.type == "cuda" and device.index is None:
        device = available_device(f"cuda:{process.local_rank}")
        torch.cuda.set_device(device)
    if process.world_size > 1:
        torch.set_num_threads(take_share_of_cores())
        _distributed().join(device)
    return device


def _distributed() -> ModuleType:
    from megastruct.engine import distributed  # it imports DeepSpeed, which takes seconds

    return distributed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=option_path, help="run folder, or one of its checkpoint folders")
    add(
        "--data",
        nargs="+",
        metavar="[NAME=]PATH",
        help="folders of token shards; or text: folders, globs, files, datasets on the hub (default: the run's own "
        "held-out data)",
    )
    add("--split", choices=get_args(Split), help="default: validation for token shards, all documents of text")
    add("--text-column", help="column or key of the text (default: the run's)")
    add("--max-tokens", type=int, help="tokens of each source (default: all)")
    add("--tasks", help="tasks of lm-evaluation-harness instead of data, with commas between them")
    add("--include-path", type=option_path, help="folder with further task files")
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add("--limit", type=int, help="documents of each task (default: all)")
    add("--batch-size", type=int, default=8, help="rows of a forward (default: %(default)s)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="default: %(default)s")
    add("--device", help="default: the GPU if there is one")
    add("--tokenizer", type=option_path, help="tokenizer file (default: the run's own)")
    add("--allow-guided", action="store_true", help="also load checkpoints from the guided phase")
    add("--json", action="store_true", help="print JSON")
    return parser


def _check(args: argparse.Namespace) -> None:
    numbers = (("max_tokens", 1), ("num_fewshot", 0), ("limit", 1), ("batch_size", 1))
    given: dict[str, Any] = vars(args)
    problems = [
        Problem(_option(name), f"{given[name]} is less than {least}", f"{_option(name)} {least} or more")
        for name, least in numbers
        if given[name] is not None and given[name] < least
    ]
    problems += [
        Problem(option, "an empty name", suggestion)
        for option, words, suggestion in (
            ("--tasks", None if args.tasks is None else args.tasks.split(","), "--tasks lambada_openai,piqa"),
            ("--data", args.data, "--data PATH"),
        )
        if words is not None and not all(map(str.strip, words))
    ]
    unused = ("data", "split", "text_column", "max_tokens") if args.tasks else ("include_path", "num_fewshot", "limit")
    because = "is not used with --tasks" if args.tasks else "is used with --tasks only"
    problems += [
        Problem(_option(name), because, f"leave {_option(name)} out") for name in unused if given[name] is not None
    ]
    if problems:
        raise UserError(problems)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
