"""The training loop, in one file.

Started by `deepspeed --module megastruct.train CONFIG [section.key=value ...]` (what ./launch.sh does), by
`torchrun -m megastruct.train ...`, or directly for one process.
"""

from __future__ import annotations

from megastruct.import_path import leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megastruct.checkpoint.store import step_of
from megastruct.config import Config, load_config
from megastruct.data import Batch, TrainingData
from megastruct.engine.distributed import choose_device, join, leave
from megastruct.engine.engine import Engine, build_engine
from megastruct.engine.internals import check_internals
from megastruct.errors import EXIT_CODE_START_AGAIN, user_errors_exit
from megastruct.launch.deepspeed import decoded
from megastruct.launch.environment import current_process, take_share_of_cores
from megastruct.launch.signals import STOP_FILE, StopRequest
from megastruct.launch.watchdog import Watch
from megastruct.metrics.devices import peak_tflops, read_peak_memory_bytes
from megastruct.metrics.perplexity import perplexity
from megastruct.metrics.spent import Spent
from megastruct.metrics.throughput import Throughput
from megastruct.metrics.writers import Metrics, MetricWriter, Progress
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.steps import data_step, guided_steps, total_steps
from megastruct.run.agreement import check_same_data, gather_cursor
from megastruct.run.checkpoints import Checkpoints, load_checkpoint
from megastruct.run.divergence import Divergence
from megastruct.run.guided_phase import end_guided_phase, guide_distances
from megastruct.run.preflight import preflight
from megastruct.run.run_folder import RunFolder
from megastruct.run.schedules import Scheduled, scheduled
from megastruct.run.way_back import go_back


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
    ) -> None:
        self.config, self.topology, self.data, self.device = config, topology, data, device
        self.checkpoints, self.stop, self.watch = checkpoints, stop, watch
        newest = checkpoints.newest()
        eod_id = data.tokenizer.eod_id
        self.engine: Engine = build_engine(config, topology, device, step_of(newest) if newest else 0, eod_id)
        self.step, cursor, state = load_checkpoint(self.engine, newest)
        self.divergence = Divergence(config, state)
        self.reader = self._open_reader(cursor if data_step(config, self.step) else None)
        self.validation = self._validation_batches()
        self.throughput = Throughput(
            config.training.tokens_per_step,
            topology.world_size,
            peak_tflops(device, config.training.precision, config.hardware.peak_tflops),
        )
        flops = [config.training.tokens_per_step * training_flops_per_token(config, share) for share in (0.0, 1.0)]
        self.spent = Spent(topology.world_size, flops[0], flops[1] - flops[0], state, self.step)
        self.writer: MetricWriter | None = None
        if dist.get_rank() == 0:
            folder = checkpoints.folder
            self.lock = folder.lock()
            stop.watch(folder.path / STOP_FILE)
            texts = folder.write(data.describe(), data.tokenizer.path)
            self.writer = MetricWriter(folder.path, self.step, texts)
        self.progress = Progress(
            total_steps(config), self.step, enabled=dist.get_rank() == 0 and config.logging.progress_bar
        )

    def train(self) -> bool:
        """Train to the last step, or until the run is asked to stop. Returns whether it is finished."""
        total, stopping = total_steps(self.config), False
        self.spent.start()
        while self.step < total and not stopping:
            if self.engine.guidance and self.step >= guided_steps(self.config):
                self.engine = end_guided_phase(self.engine, self.checkpoints, self.step, *self._place())
            if self.step == self.config.training.base_steps:  # the data of the guided steps is read again
                self.divergence.skipped_data_steps = 0
                self.reader = self._open_reader(None)
            self.watch.arrived(self.step)
            self.stop.ask(self.device)
            now = scheduled(self.config, self.step)
            loss = self._train_step(now)
            stopping = self.stop.agreed()
            if self.divergence.note(self.step, loss, self.engine.gradient_norm()) and self._went_back(loss):
                continue
            last = self.step == total
            metrics = self._metrics(loss, now) if _due(self.step, self.config.logging.interval_steps, last) else {}
            if _due(self.step, self.config.evaluation.interval_steps, last):
                metrics |= self._validate()
            if self.writer and metrics:  # every record has the values that curves are drawn over
                tokens = self.step * self.config.training.tokens_per_step
                self.writer.write(self.step, metrics | {"tokens": tokens, **self.spent.read()})
            if _due(self.step, self.config.checkpoint.interval_steps, last or stopping):
                self.checkpoints.start_save(self.engine, self.step, *self._place())
        self.checkpoints.finish_save()
        self.progress.close()
        if self.writer:
            self.writer.close()
            if self.step < total:
                self.stop.say(self.step, self.checkpoints.folder.path)
        return self.step == total

    def _train_step(self, now: Scheduled) -> float:
        start = time.perf_counter()
        with self.throughput.step():
            self.engine.set_learning_rate(now.learning_rate)
            self.engine.set_alpha(now.alpha, self.step)
            loss = self.engine.train_batch(self._timed(self.reader) if self.reader else None)
        share = self.engine.guidance.read_share() if self.engine.guidance else 0.0
        self.throughput.guided(share)
        self.spent.step(share)
        self.step += 1
        self.progress.update(loss, self.config.training.tokens_per_step / (time.perf_counter() - start))
        return loss

    def _went_back(self, loss: float) -> bool:
        """After a spike, go back to the newest checkpoint and continue with later data; False if that is impossible."""
        spike, cursor = self.step, self._cursor()
        returned = go_back(self.engine, self.checkpoints, self.divergence, spike, loss, cursor, self.spent.state())
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
        memory = torch.tensor(read_peak_memory_bytes(self.device), device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        share = self.throughput.guide_share  # includes steps from before the end of the guided phase
        guided = {"alpha": now.alpha, "guide_share": share} if self.engine.guidance else {}
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            **guided,
            "learning_rate": now.learning_rate,
            "grad_norm": self.engine.gradient_norm(),
            "skipped_steps": self.divergence.skipped_steps,
            "skipped_data_steps": self.divergence.skipped_data_steps,
            "memory_bytes": int(memory),
            "skipped_documents": self.data.skipped_documents(self._cursor()),
            **self.throughput.read(training_flops_per_token(self.config, share)),
        }

    def _validate(self) -> Metrics:
        """Loss on held-out samples of the structured model alone; with guides, the blended loss as well."""
        metrics: Metrics = {}
        if self.engine.guidance:
            metrics = {f"guide_distance/{name}": value for name, value in guide_distances(self.engine).items()}
        if not self.config.evaluation.num_samples:
            return metrics
        count = self.config.evaluation.num_samples // (self.config.training.micro_batch_size * self.topology.dp_size)
        of_each_source = len(self.config.data.sources) > 1
        with self.engine.loss.recording(of_each_source) as rows:
            loss = self.engine.evaluate(self.validation, count)
        if self.writer:
            self.progress.say(f"step {self.step}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        metrics |= {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
        if of_each_source:
            metrics |= self._source_losses(rows)
        if self.engine.guidance:
            blended = scheduled(self.config, self.step).alpha
            metrics["validation_loss_guided"] = self.engine.evaluate(self.validation, count, blended)
        return metrics

    def _source_losses(self, rows: list[torch.Tensor]) -> Metrics:
        """The validation loss of each source of a mixture, from the loss of each row [micro_batch]. Collective."""
        sources = self.data.validation_sources(*self._validation_sizes())
        totals = torch.zeros(len(sources), 2, dtype=torch.float64)  # sum and number of rows
        for total, mask in zip(totals, sources.values(), strict=True) if rows else []:
            own = torch.stack(rows).cpu().double()[torch.from_numpy(mask)]
            total += torch.stack((own.sum(), own.new_tensor(len(own))))
        totals = totals.to(self.device)
        # The ranks of a tensor-parallel group add equal rows, which leaves the means as they are.
        dist.all_reduce(totals)
        sums = zip(sources, totals.tolist(), strict=True)
        return {f"validation_loss/{name}": total / num_rows for name, (total, num_rows) in sums if num_rows}

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
        return self.data.validation_batches(*self._validation_sizes())

    def _validation_sizes(self) -> tuple[int, int, int, int]:
        """Samples, micro-batch size, replica of this rank, and number of replicas."""
        replica = self.topology.dp_rank(dist.get_rank())
        micro_batch_size = self.config.training.micro_batch_size
        return self.config.evaluation.num_samples, micro_batch_size, replica, self.topology.dp_size

    def _cursor(self) -> np.ndarray:
        """The position of the whole run in the data. Collective."""
        own = self.reader.cursor() if self.reader else None
        return gather_cursor(own, self.data.cursor_shape, self.device)

    def _place(self) -> tuple[np.ndarray, dict[str, Any]]:
        """What a checkpoint stores besides tensors: the position in the data, and plain values. Collective."""
        return self._cursor(), self.divergence.state_at(self.step) | self.spent.state()

    def _timed(self, reader: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(reader)
            self.throughput.waited_for_data(time.perf_counter() - start)
            yield batch


def _say_on_first_rank(rank: int) -> Callable[[str], None]:
    return lambda line: None if rank else print(line, file=sys.stderr, flush=True)


def _due(step: int, interval_steps: int, last: bool) -> bool:
    return last or (interval_steps > 0 and step % interval_steps == 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on this rank; exit code 2 for a user error, 75 if the run was asked to stop and has saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, for example configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(decoded(sys.argv[1:] if argv is None else argv))
    process, stop, finished = current_process(), StopRequest(), True
    with user_errors_exit(print_message=process.local_rank == 0):  # the same on all ranks of a node
        check_internals()
        config = load_config(args.config, args.overrides)
        topology, data = preflight(config, process.world_size, _say_on_first_rank(process.rank))
    with user_errors_exit(rank=process.rank):
        torch.set_num_threads(take_share_of_cores())
        device = choose_device(config.hardware.device, process)
        limits = config.reliability
        join(device, limits.collective_seconds)
        with Watch(process, limits.silence_seconds, limits.collective_seconds) as watch:
            check_same_data(data.describe())
            checkpoints = Checkpoints(RunFolder(config))
            if checkpoints.agreed_finished_steps() < total_steps(config):
                finished = Run(config, topology, data, device, checkpoints, stop, watch).train()
            elif process.rank == 0:
                print(f"{checkpoints.folder.path} is finished: {total_steps(config)} steps are done.", file=sys.stderr)
        leave()
    if not finished:
        raise SystemExit(EXIT_CODE_START_AGAIN)


if __name__ == "__main__":
    main()
