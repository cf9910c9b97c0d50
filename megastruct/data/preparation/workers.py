"""Run the jobs of a preparation in worker processes, report progress, and handle workers that die."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from megastruct.data.preparation.shard import OutputError, ShardJob, ShardRecord, make_shard
from megastruct.errors import Problem, Problems, UserError
from megastruct.import_path import import_variables_set
from megastruct.processes import end_with_parent

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 30.0
_counts: Any = None  # in a worker: shared [documents, tokens, bytes of shards] of all workers


def run_jobs(jobs: list[ShardJob], num_workers: int, report: Callable[[str], None]) -> dict[int, ShardRecord]:
    """Run all jobs; returns the records by the indices of the jobs.

    A damaged shard does not stop the others, so that all damaged shards are reported at once. An output that cannot be
    written stops all jobs.

    Raises:
        UserError: shards are damaged, the output cannot be written, or a worker died. Finished shards are kept.
    """
    progress = _Progress(jobs, report)
    try:
        if num_workers == 1 or len(jobs) <= 1:
            return _run_here(jobs, progress)
        with import_variables_set():
            return _run_in_pool(jobs, num_workers, progress)
    finally:
        progress.close()


def _run_here(jobs: list[ShardJob], progress: _Progress) -> dict[int, ShardRecord]:
    records, problems = {}, Problems()
    for job in jobs:
        try:
            records[job.index] = make_shard(job, progress.add)
            progress.finish_shard(job)
        except OutputError:
            raise
        except UserError as error:
            problems.take(error)
    problems.raise_if_any()
    return records


def _run_in_pool(jobs: list[ShardJob], num_workers: int, progress: _Progress) -> dict[int, ShardRecord]:
    # Spawned, not forked, because the threads of Arrow and SentencePiece do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3)
    records, problems = {}, Problems()
    num_workers = min(num_workers, len(jobs))
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(counts, os.getpid()))
    try:
        jobs_of = {pool.submit(_work, pickle.dumps(job)): job for job in jobs}
        running: set[Future] = set(jobs_of)
        while running:
            done, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            progress.set(counts[0], counts[1], counts[2])
            for future in done:
                try:
                    records[jobs_of[future].index] = future.result()
                    progress.finish_shard(jobs_of[future])
                except OutputError:
                    raise
                except UserError as error:
                    problems.take(error)
    except BrokenProcessPool:
        found = "a worker process died; it was killed, or the machine ran out of memory"
        suggestion = f"run the same command again to continue, with --workers {num_workers // 2} if memory was short"
        raise UserError(Problem("--workers", found, suggestion)) from None
    except BaseException:  # one Ctrl-C stops all workers
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    problems.sort(key=lambda problem: problem.where)
    problems.raise_if_any()
    return records


def _start_worker(counts: Any, parent: int) -> None:
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent says it once
    end_with_parent(parent)  # it must not write beside the run that follows


def _work(pickled_job: bytes) -> ShardRecord:
    """Unpickle a job and run it. An error of unpickling must be raised here: in the pool it would end the process."""
    job = pickle.loads(pickled_job)  # noqa: S301 - pickled by this program

    def count(*parts: int) -> None:
        with _counts.get_lock():
            for index, part in enumerate(parts):
                _counts[index] += part

    return make_shard(job, count)


class _Progress:
    """A bar with speed and remaining time on a terminal; elsewhere a line per finished shard and every 30 s.

    The remaining time is estimated from the bytes of shards that were read: the share of rows of a parquet file, and
    the bytes of text of other files.
    """

    def __init__(self, jobs: list[ShardJob], report: Callable[[str], None]) -> None:
        self._report = report
        self._num_shards, self._num_bytes = len(jobs), sum(job.shard.num_bytes for job in jobs)
        self._done_shards = self._read_bytes = 0
        self._num_documents = self._num_tokens = 0
        self._start_seconds = self._last_line_seconds = time.monotonic()
        self._bar = tqdm(
            total=self._num_bytes, unit="B", unit_scale=True, desc="shards", disable=not sys.stderr.isatty()
        )

    def add(self, num_documents: int, num_tokens: int, num_bytes: int) -> None:
        self.set(self._num_documents + num_documents, self._num_tokens + num_tokens, self._read_bytes + num_bytes)

    def set(self, num_documents: int, num_tokens: int, read_bytes: int) -> None:
        self._num_documents, self._num_tokens = num_documents, num_tokens
        self._bar.set_postfix_str(self._speed(), refresh=False)
        self._bar.update(read_bytes - self._read_bytes)
        self._read_bytes = read_bytes
        if self._bar.disable and time.monotonic() - self._last_line_seconds >= _SECONDS_BETWEEN_LINES:
            self._say(f"{self._done_shards}/{self._num_shards} shards done")

    def finish_shard(self, job: ShardJob) -> None:
        self._done_shards += 1
        if self._bar.disable:
            self._say(f"shard {self._done_shards}/{self._num_shards} done ({job.shard.name})")

    def close(self) -> None:
        self._bar.close()

    def _say(self, what: str) -> None:
        self._last_line_seconds = time.monotonic()
        seconds = self._last_line_seconds - self._start_seconds
        left_seconds = seconds * max(0.0, self._num_bytes / max(1, self._read_bytes) - 1)
        self._report(f"{what}: {self._speed()}, {tqdm.format_interval(left_seconds)} left")

    def _speed(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._start_seconds)
        return f"{self._num_documents / seconds:,.0f} documents/s, {self._num_tokens / seconds:,.0f} tokens/s"
