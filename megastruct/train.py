"""Train a model: the loop, in one file.

Started by `deepspeed --module megastruct.train CONFIG [section.key=value ...]` (what ./launch.sh does), by
`torchrun -m megastruct.train ...`, or alone for one process.
"""

from __future__ import annotations

from megastruct.import_path import leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megastruct.config import Config, load_config
from megastruct.data import Batch
from megastruct.engine.engine import Engine, build_engine
from megastruct.errors import EXIT_CODE_START_AGAIN, user_errors_exit
from megastruct.launch.deepspeed import decoded
from megastruct.launch.distributed import choose_device, join, leave
from megastruct.launch.environment import current_process, take_share_of_cores
from megastruct.launch.signals import STOP_FILE, StopRequest
from megastruct.launch.watchdog import Watch
from megastruct.metrics.devices import peak_tflops, read_peak_memory_bytes
from megastruct.metrics.throughput import Throughput
from megastruct.metrics.writers import Metrics, MetricWriter, Progress
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.steps import data_step, guided_steps, total_steps
from megastruct.run.divergence import Divergence, is_way_back
from megastruct.run.guided_phase import end_guided_phase, guide_distances
from megastruct.run.preflight import Data, preflight
from megastruct.run.resume import (
    agreed_finished_steps,
    check_same_data,
    find_checkpoint,
    finish_save,
    gather_cursor,
    resume,
    save,
    start_save,
)
from megastruct.run.run_folder import lock_run_folder, run_folder, step_of, write_run_folder
from megastruct.run.schedules import alpha, learning_rate


class Run:
    """One run on one rank, from its newest checkpoint to its last step."""

    def __init__(
        self, config: Config, topology: Topology, data: Data, device: torch.device, stop: StopRequest, watch: Watch
    ) -> None:
        self.config, self.topology, self.data, self.device = config, topology, data, device
        self.stop, self.watch = stop, watch
        checkpoint = find_checkpoint(config)
        first_step, eod_id = step_of(checkpoint) if checkpoint else 0, data.tokenizer.eod_id
        self.engine: Engine = build_engine(config, topology, device, first_step, eod_id)
        self.step, cursor, state = resume(self.engine, checkpoint)
        self.divergence = Divergence(config, state)
        self.reader = self._open_reader(cursor if data_step(config, self.step) else None)
        self.validation = self._validation_batches()
        self.throughput = Throughput(
            config.training.tokens_per_step,
            topology.world_size,
            peak_tflops(device, config.training.precision, config.hardware.peak_tflops),
        )
        self.writer: MetricWriter | None = None
        if dist.get_rank() == 0:
            self.lock = lock_run_folder(config)
            stop.watch(run_folder(config) / STOP_FILE)
            texts = write_run_folder(config, data.describe(), data.tokenizer.path)
            self.writer = MetricWriter(run_folder(config), self.step, texts)
        self.progress = Progress(
            total_steps(config), self.step, enabled=dist.get_rank() == 0 and config.logging.progress_bar
        )

    def train(self) -> bool:
        """To the last step, or until it is asked to stop: whether it is finished."""
        total, stopping = total_steps(self.config), False
        while self.step < total and not stopping:
            if self.engine.guidance and self.step >= guided_steps(self.config):
                self.engine = end_guided_phase(self.engine, self.step, self._cursor(), self._state())
            if self.step == self.config.training.base_steps:  # the guided steps' data, once more
                self.divergence.skipped_data_steps = 0
                self.reader = self._open_reader(None)
            self.watch.arrived(self.step)
            self.stop.ask(self.device)
            loss = self._train_step()
            stopping = self.stop.agreed()
            if self.divergence.note(self.step, loss, self.engine.gradient_norm()) and self._went_back(loss):
                continue
            last = self.step == total
            metrics = self._metrics(loss) if last or self.step % self.config.logging.interval_steps == 0 else {}
            if _due(self.step, self.config.evaluation.interval_steps, last):
                metrics |= self._validate()
            if self.writer and metrics:
                self.writer.write(self.step, metrics)
            if _due(self.step, self.config.checkpoint.interval_steps, last or stopping):
                start_save(self.engine, self.step, self._cursor(), self._state())
        finish_save()
        self.progress.close()
        if self.writer:
            self.writer.close()
            if self.step < total:
                self.stop.say(self.step, run_folder(self.config))
        return self.step == total

    @property
    def tokens(self) -> int:
        return self.step * self.config.training.tokens_per_step

    def _train_step(self) -> float:
        start = time.perf_counter()
        with self.throughput.step():
            self.engine.set_learning_rate(learning_rate(self.config, self.step))
            self.engine.set_alpha(alpha(self.config, self.step), self.step)
            loss = self.engine.train_batch(self._timed(self.reader) if self.reader else None)
        if self.engine.guidance:
            self.throughput.guided(self.engine.guidance.read_share())
        self.step += 1
        self.progress.update(loss, self.config.training.tokens_per_step / (time.perf_counter() - start))
        return loss

    def _went_back(self, loss: float) -> bool:
        """After a spike: to the newest checkpoint, and on with the data after the spike; false if there is no way."""
        cursor, spike, guides_left = self._cursor(), self.step, not self.engine.guidance
        finish_save()  # it may be the newest
        checkpoint = None  # to read all of its files only for a way back that there is
        if is_way_back(self.config, spike, agreed_finished_steps(self.config), guides_left):
            checkpoint = find_checkpoint(self.config)
        if checkpoint is None or not is_way_back(self.config, spike, step_of(checkpoint), guides_left):
            self.divergence.recent_losses.append(loss)  # else every loss after a lasting rise would be a spike
            return False
        self.step, _, state = resume(self.engine, checkpoint)
        self.divergence = self.divergence.went_back(spike, self.step, state)
        save(self.engine, self.step, cursor, self._state())  # a restart must not read the skipped data, either
        if self.writer:
            self.writer.go_back(self.step)
            self.progress.say(
                f"step {spike}: the loss is {loss:.4f}, a spike; on from step {self.step} with later data"
            )
        self.progress.go_back(self.step)
        return True

    def _metrics(self, loss: float) -> Metrics:
        memory = torch.tensor(read_peak_memory_bytes(self.device), device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        share = self.throughput.guide_share  # of steps before the guides left, too
        guided = {"alpha": alpha(self.config, self.step - 1), "guide_share": share} if self.engine.guidance else {}
        return {
            "loss": loss,
            "perplexity": _perplexity(loss),
            **guided,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "grad_norm": self.engine.gradient_norm(),
            "tokens": self.tokens,
            "skipped_steps": self.divergence.skipped_steps,
            "skipped_data_steps": self.divergence.skipped_data_steps,
            "memory_bytes": int(memory),
            "skipped_documents": self.data.skipped_documents(self._cursor()),
            **self.throughput.read(training_flops_per_token(self.config, share)),
        }

    def _validate(self) -> Metrics:
        """Loss on held-out samples: of the structured model alone, as it will be used; guides have it beside."""
        metrics: Metrics = {}
        if self.engine.guidance:
            metrics = {f"guide_distance/{name}": value for name, value in guide_distances(self.engine).items()}
        if not self.config.evaluation.num_samples:
            return metrics
        count = self.config.evaluation.num_samples // (self.config.training.micro_batch_size * self.topology.dp_size)
        loss = self.engine.evaluate(self.validation, count)
        if self.writer:
            self.progress.say(f"step {self.step}: validation loss {loss:.4f}, perplexity {_perplexity(loss):.2f}")
        metrics |= {"validation_loss": loss, "validation_perplexity": _perplexity(loss)}
        if self.engine.guidance:
            blended = alpha(self.config, self.step)
            metrics["validation_loss_guided"] = self.engine.evaluate(self.validation, count, blended)
        return metrics

    def _open_reader(self, cursor: Any) -> Any:
        if not self.engine.reads_data:
            return None
        training = self.config.training
        return self.data.train_reader(
            training.global_batch_size,
            training.micro_batch_size,
            self.topology.dp_rank(dist.get_rank()),
            self.topology.dp_size,
            cursor,
            start_sample=(data_step(self.config, self.step) + self.divergence.skipped_data_steps)
            * training.global_batch_size,
        )

    def _validation_batches(self) -> list[Batch]:
        if not self.engine.reads_data or not self.config.evaluation.num_samples:
            return []
        return self.data.validation_batches(
            self.config.evaluation.num_samples,
            self.config.training.micro_batch_size,
            self.topology.dp_rank(dist.get_rank()),
            self.topology.dp_size,
        )

    def _cursor(self) -> Any:
        """Where the whole run stands in the data. Collective."""
        return gather_cursor(self.engine, self.reader.cursor() if self.reader else None, self.data.cursor_shape)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors and the place in the data."""
        return {"tokens": self.tokens, **self.divergence.state}

    def _timed(self, reader: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(reader)
            self.throughput.waited_for_data(time.perf_counter() - start)
            yield batch


def _due(step: int, interval_steps: int, last: bool) -> bool:
    return last or (interval_steps > 0 and step % interval_steps == 0)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond, a float overflows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, for example configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(decoded(sys.argv[1:] if argv is None else argv))
    process, stop, finished = current_process(), StopRequest(), True
    with user_errors_exit(print_message=process.local_rank == 0):  # the same on all ranks of a node
        config = load_config(args.config, args.overrides)
        topology, data = preflight(config, process.world_size)
    with user_errors_exit(rank=process.rank):
        torch.set_num_threads(take_share_of_cores())
        device = choose_device(config.hardware.device, process)
        limits = config.reliability
        join(device, limits.collective_seconds)
        with Watch(process, limits.silence_seconds, limits.collective_seconds) as watch:
            check_same_data(data.describe())
            if agreed_finished_steps(config) < total_steps(config):
                finished = Run(config, topology, data, device, stop, watch).train()
            elif process.rank == 0:
                print(f"{run_folder(config)} is finished: {total_steps(config)} steps are done.", file=sys.stderr)
        leave()
    if not finished:
        raise SystemExit(EXIT_CODE_START_AGAIN)


if __name__ == "__main__":
    main()
