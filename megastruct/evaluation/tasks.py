"""Runs tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import difflib
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megastruct.errors import Problem, UserError
from megastruct.inference.load import Loaded

# What is reported of the harness's results; the rest is its environment.
_REPORTED = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")


class Tasks:
    """Tasks of the harness by name, checked before a model is loaded.

    Raises:
        UserError: the harness is not installed, or a task is unknown; with the nearest names.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """`names`: tasks, groups, tags, or patterns of them; `include_path`: a folder with more task files."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            found = "need lm-evaluation-harness, which is not installed"
            raise UserError(Problem("--tasks", found, "pip install 'megastruct[lm-eval]'")) from None
        if include_path is not None and not include_path.is_dir():
            raise UserError(Problem("--include-path", f"{include_path} is not a folder", "a folder with task files"))
        self._manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        # Indexing the harness's own tasks, more than ten thousand, takes seconds.
        if self._manager is None or not set(names) <= set(self._manager.all_subtasks):
            self._manager = TaskManager(include_path=include_path)
        self.names = [match for name in names for match in self._manager.match_tasks([name])]
        problems = [self._unknown(name) for name in names if not self._manager.match_tasks([name])]
        if problems:
            raise UserError(problems)

    def _unknown(self, name: str) -> Problem:
        assert self._manager
        near = difflib.get_close_matches(name, self._manager.all_tasks, n=3, cutoff=0.6)
        suggestion = ", ".join(near) or "lm-eval ls tasks, which lists all names"
        return Problem("--tasks", f"{name} is not a task", suggestion)

    def run(
        self, loaded: Loaded, batch_size: int, num_fewshot: int | None = None, limit: int | None = None
    ) -> dict[str, Any]:
        """The harness's results; empty on all ranks but the first. Collective, if torch.distributed is in use.

        `limit`: documents of each task.

        Raises:
            UserError: the data of a task cannot be read, or its file has a mistake.
        """
        import lm_eval

        from megastruct.evaluation.lm_eval import MegastructLM

        try:
            results = lm_eval.simple_evaluate(
                model=MegastructLM(loaded, batch_size=batch_size),
                tasks=list(self.names),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
            )
        except OSError as error:  # of the datasets library: no connection, no such dataset or file
            found = f"the data of {', '.join(self.names)} cannot be read: {str(error).splitlines()[0]}"
            suggestion = "check the connection and the dataset_path of the task"
            raise UserError(Problem("--tasks", found, suggestion)) from None
        except Exception as error:  # of any kind: the harness does not check the files of tasks
            if isinstance(error, UserError) or _passed(error, MegastructLM.__module__):
                raise
            found = f"{', '.join(self.names)} cannot be run: {type(error).__name__}: {error}"
            suggestion = "check the task's file and the columns and splits of its data"
            raise UserError(Problem("--tasks", found, suggestion)) from error
        return dict(results or {})


def _passed(error: Exception, module: str) -> bool:
    """Whether the error came out of a function of `module`."""
    return any(frame.f_globals.get("__name__") == module for frame, _ in traceback.walk_tb(error.__traceback__))


def task_table(results: dict[str, Any]) -> str:
    """The harness's own tables: tasks, then groups."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def tasks_as_json(model: dict[str, Any], results: dict[str, Any]) -> str:
    """One JSON object: what `model` says of the model, and the harness's results by task."""
    reported = {key: results[key] for key in _REPORTED if results.get(key)}
    return json.dumps({**model, **reported}, indent=1, default=str)
