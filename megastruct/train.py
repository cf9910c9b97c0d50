"""The training loop, in one file.

Started by `deepspeed --module megastruct.train CONFIG [section.key=value ...]` (what ./launch.sh does), by
`torchrun -m megastruct.train ...`, or directly for one process.
"""

from __future__ import annotations

from megastruct.import_path import leave_out_working_folder
from megastruct.processes import end_with_launcher

if __name__ == "__main__":
    leave_out_working_folder()
    end_with_launcher()

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megastruct.checkpoint.store import step_of
from megastruct.config import Config, load_config
from megastruct.console import lasting_command
from megastruct.data import Batch, TrainingData
from megastruct.engine.determinism import make_deterministic
from megastruct.engine.distributed import choose_device, join, leave
from megastruct.engine.engine import Engine, build_engine
from megastruct.engine.internals import check_internals
from megastruct.engine.ranges import named_ranges
from megastruct.errors import EXIT_CODE_START_AGAIN, user_errors_exit
from megastruct.launch.deepspeed import decoded
from megastruct.launch.environment import (
    current_process,
    keep_compiled_code,
    seconds_since_start,
    take_share_of_cores,
)
from megastruct.launch.signals import StopRequest
from megastruct.launch.watchdog import Watch
from megastruct.metrics.devices import peak_tflops, read_peak_memory_bytes
from megastruct.metrics.perplexity import perplexity
from megastruct.metrics.progress import Progress, style_of
from megastruct.metrics.spent import Spent
from megastruct.metrics.start_times import StartTimes
from megastruct.metrics.stragglers import Parts, slowest
from megastruct.metrics.throughput import Throughput
from megastruct.metrics.waiting import Waiting
from megastruct.metrics.wandb_writer import open_wandb
from megastruct.metrics.writers import Metrics, MetricWriter
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.steps import guided_steps, total_steps
from megastruct.profiling.flight_recorder import FlightRecorder
from megastruct.profiling.traces import StepProfiler
from megastruct.run.agreement import check_same_data, gather_cursor, gather_numbers
from megastruct.run.branch import branch
from megastruct.run.checkpoints import Checkpoints, load_checkpoint, place_in_data
from megastruct.run.divergence import Divergence
from megastruct.run.garbage import AlignedCollection
from megastruct.run.guided_phase import end_guided_phase
from megastruct.run.preflight import preflight
from megastruct.run.run_folder import RunFolder
from megastruct.run.schedules import Scheduled, scheduled
from megastruct.run.summary import summary
from megastruct.run.validation import Validation
from megastruct.run.way_back import go_back
from megastruct.stops import STOP_FILE


class Run:
    """One run on one rank, from its newest checkpoint to its last step."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        data: TrainingData,
        device: torch.device,
        checkpoints: Checkpoints,
        stop: StopRequest,
        watch: Watch,
        garbage: AlignedCollection,
        times: StartTimes,
    ) -> None:
        self.times: StartTimes | None = times  # until the first step is done
        self.config, self.topology, self.data, self.device = config, topology, data, device
        self.checkpoints, self.stop, self.watch, self.garbage = checkpoints, stop, watch, garbage
        self.profiler = StepProfiler(config.profiling, checkpoints.folder.path, dist.get_rank(), device)
        newest = checkpoints.newest()
        eod_id = data.tokenizer.eod_id
        begins = newest is None and config.run.from_ is not None
        begun, drawn = step_of(newest) if newest else 0, not (newest or begins)
        self.engine: Engine = build_engine(config, topology, device, begun, eod_id, drawn)
        times.done("model and engine")
        self.step, _, state = branch(self.engine, checkpoints) if begins else load_checkpoint(self.engine, newest)
        times.done("checkpoint")
        self.divergence = Divergence(config, state)
        self.earlier_optimizer_steps: int = state.get("earlier_optimizer_steps", 0)  # of the parents
        self.sample, cursor = place_in_data(config, state)
        self.batch_size = config.training.batch_sizes.at(self.step)
        self.reader = self._open_reader(cursor)
        self.validation = Validation(config, topology, data, self.engine.reads_data)
        self.throughput = Throughput(
            config.training.tokens_per_step,
            topology.world_size,
            peak_tflops(device, config.training.precision, config.hardware.peak_tflops),
        )
        self.waiting = Waiting(device, topology.world_size)
        flops = [config.training.tokens_per_step * training_flops_per_token(config, share) for share in (0.0, 1.0)]
        self.spent = Spent(topology.world_size, flops[0], flops[1] - flops[0], state, self.step)
        self.writer: MetricWriter | None = None
        if dist.get_rank() == 0:
            folder = checkpoints.folder
            self.lock = folder.lock()
            stop.watch(folder.path / STOP_FILE)
            texts = folder.write(data.describe(), data.tokenizer.files)
            self.writer = MetricWriter(folder.path, self.step, texts, open_wandb(config, folder.path))
            print(summary(config, topology, data, device, self.step), file=sys.stderr, flush=True)
        style = style_of(config.logging) if dist.get_rank() == 0 else "off"
        self.progress = Progress(total_steps(config), self.step, style)

    def train(self) -> bool:
        """Train to the last step, or until the run is asked to stop. Returns whether it is finished."""
        total, stopping = total_steps(self.config), False
        self.spent.start()
        while self.step < total and not stopping:
            if self.engine.guidance and self.step >= guided_steps(self.config):
                self.garbage.search_all()
                self.engine = end_guided_phase(self.engine, self.checkpoints, self.step, *self._place())
            if self.step == self.config.training.base_steps:  # the data of the guided steps is read again
                self.divergence.skipped_data_steps = self.sample = 0
                self.reader = self._open_reader(None)
            self._use_batch_size()
            self.watch.arrived(self.step)
            self.stop.ask(self.device)
            now = scheduled(self.config, self.step)
            with self.profiler.step(self.step + 1, lambda: named_ranges(self.engine)):
                loss = self._train_step(now)
            self._say_start_is_over()
            stopping = self.stop.agreed()
            self.garbage.finished(self.step)
            norm, finish_save = self.engine.gradient_norm(), self.checkpoints.finish_save
            if self.divergence.note(self.step, loss, norm, finish_save) and self._went_back(loss):
                continue
            last = self.step == total
            metrics = self._metrics(loss, now) if _due(self.step, self.config.logging.interval_steps, last) else {}
            if _due(self.step, self.config.evaluation.interval_steps, last):
                metrics |= self._validate()
            if self.writer and metrics:  # every record has the values that curves are drawn over
                tokens = self.config.training.tokens(self.step)
                self.writer.write(self.step, metrics | {"tokens": tokens, **self.spent.read()})
                self.progress.record(self.step, metrics)
            if _due(self.step, self.config.checkpoint.interval_steps, last or stopping):
                self.checkpoints.start_save(self.engine, self.step, *self._place())
        self.checkpoints.finish()
        self.progress.close()
        if self.writer:
            self.writer.close()
            if self.step < total:
                self.stop.say(self.step, self.checkpoints.folder.path)
        return self.step == total

    def _use_batch_size(self) -> None:
        """Have engine and reader use the batch size of the next step. Collective."""
        size = self.config.training.batch_sizes.at(self.step)
        if size != self.batch_size:
            cursor = self._cursor()
            self.batch_size = size
            self.reader = self._open_reader(cursor)
        self.engine.set_batch_size(size)

    def _train_step(self, now: Scheduled) -> float:
        start, batch_share = time.perf_counter(), self.batch_size / self.config.training.global_batch_size
        with self.throughput.step(batch_share), self.waiting.step() as waited_seconds:
            self.engine.set_learning_rate(now.learning_rate)
            self.engine.set_alpha(now.alpha, self.step)
            loss = self.engine.train_batch(self._timed(self.reader) if self.reader else None)
        self.throughput.waited_for_ranks(waited_seconds())
        share = self.engine.guidance.read_share() if self.engine.guidance else 0.0
        self.throughput.guided(share)
        self.spent.step(share, batch_share)
        self.step += 1
        self.sample += self.batch_size
        num_tokens = self.batch_size * self.config.training.seq_length
        self.progress.update(loss, num_tokens / (time.perf_counter() - start))
        return loss

    def _say_start_is_over(self) -> None:
        if self.times:
            self.times.done("data and first step")
            if self.writer:
                self.progress.say(f"step {self.step} done {self.times}")
            self.times = None

    def _went_back(self, loss: float) -> bool:
        """After a spike, go back to the newest checkpoint and continue with later data; False if that is impossible."""
        spike, cursor = self.step, self._cursor()
        returned = go_back(self.engine, self.checkpoints, self.divergence, spike, loss, cursor, self._kept())
        if returned is None:
            return False
        self.step, self.divergence = returned
        if self.writer:
            self.writer.go_back(self.step)
            self.progress.say(
                f"step {spike}: loss spike ({loss:.4f}); continuing from step {self.step} with later data"
            )
        self.progress.go_back(self.step)
        return True

    def _metrics(self, loss: float, now: Scheduled) -> Metrics:
        every = gather_numbers([read_peak_memory_bytes(self.device), *self.throughput.parts()], self.device)
        share = self.throughput.guide_share  # includes steps from before the end of the guided phase
        guided = {"alpha": now.alpha, "guide_share": share} if self.engine.guidance else {}
        z_loss = {"z_loss": self.engine.loss.read_z(self.device)} if self.engine.loss.has_z else {}
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            **z_loss,
            **guided,
            "learning_rate": now.learning_rate,
            "grad_norm": self.engine.gradient_norm(),
            "skipped_steps": self.divergence.skipped_steps,
            "skipped_data_steps": self.divergence.skipped_data_steps,
            "memory_bytes": int(max(memory for memory, *_ in every)),
            "skipped_documents": self.data.skipped_documents(self._cursor()),
            **self.throughput.read(training_flops_per_token(self.config, share)),
            **slowest([Parts(*parts) for _, *parts in every]),
        }

    def _validate(self) -> Metrics:
        metrics = self.validation.metrics(self.engine, self.step)
        loss = metrics.get("validation_loss")
        if self.writer and loss is not None:
            self.progress.say(f"step {self.step}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        return metrics

    def _open_reader(self, cursor: Any) -> Any:
        if not self.engine.reads_data:
            return None
        return self.data.train_reader(
            self.batch_size,
            self.config.training.micro_batch_size,
            self.topology.dp_rank(dist.get_rank()),
            self.topology.dp_size,
            cursor,
            start_sample=self.sample,
        )

    def _cursor(self) -> np.ndarray:
        """The position of the whole run in the data. Collective."""
        own = self.reader.cursor() if self.reader else None
        return gather_cursor(own, self.data.cursor_shape, self.device)

    def _place(self) -> tuple[np.ndarray, dict[str, Any]]:
        """What a checkpoint stores besides tensors: the position in the data, and plain values. Collective."""
        return self._cursor(), self.divergence.state_at(self.step) | self._kept()

    def _kept(self) -> dict[str, Any]:
        """The plain values of a checkpoint that do not go back after a spike."""
        kept = {"sample": self.sample, "earlier_optimizer_steps": self.earlier_optimizer_steps}
        return kept | self.spent.state()

    def _timed(self, reader: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(reader)
            self.throughput.waited_for_data(time.perf_counter() - start)
            yield batch


def _due(step: int, interval_steps: int, last: bool) -> bool:
    return last or (interval_steps > 0 and step % interval_steps == 0)


@lasting_command
def main(argv: Sequence[str] | None = None) -> None:
    """Train on this rank; exit code 2 for a user error, 75 if the run was asked to stop and has saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, for example configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(decoded(sys.argv[1:] if argv is None else argv))
    process, stop, finished = current_process(), StopRequest(), True
    times = StartTimes(seconds_since_start(), "command and imports")
    with user_errors_exit(print_message=process.local_rank == 0):  # the same on all ranks of a node
        check_internals()
        config = load_config(args.config, args.overrides)
        if config.reliability.deterministic:
            make_deterministic()
        topology, data = preflight(
            config, process.world_size, report=lambda line: None if process.rank else print(line, file=sys.stderr)
        )
        times.done("checks")
    with user_errors_exit(rank=process.rank):
        torch.set_num_threads(take_share_of_cores())
        device = choose_device(config.hardware.device, process)
        limits, folder = config.reliability, RunFolder(config)
        keep_compiled_code(config.hardware.compile_cache)
        recorder = FlightRecorder(config.profiling, folder.path, process.rank)
        join(device, limits.collective_seconds)
        times.done("joining")
        watch = Watch(process, limits.silence_seconds, limits.collective_seconds, recorder.dump)
        with watch, AlignedCollection(limits.gc_interval_steps) as garbage:
            check_same_data(data.describe())
            checkpoints = Checkpoints(folder)
            if checkpoints.agreed_finished_steps() < total_steps(config):
                finished = Run(config, topology, data, device, checkpoints, stop, watch, garbage, times).train()
            elif process.rank == 0:
                print(f"{checkpoints.folder.path} is finished: {total_steps(config)} steps are done.", file=sys.stderr)
        leave()
    if not finished:
        raise SystemExit(EXIT_CODE_START_AGAIN)


if __name__ == "__main__":
    main()
