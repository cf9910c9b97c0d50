"""Validation during training: on what the training data holds out, and on further sources by name."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from megastruct.config.schema import Config
from megastruct.data import TrainingData
from megastruct.data.batch import Batch
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.mixture import source_names
from megastruct.data.options import DataOptions
from megastruct.data.validation import ValidationSource
from megastruct.engine.engine import Engine
from megastruct.errors import Problem, Problems
from megastruct.metrics.perplexity import perplexity
from megastruct.metrics.writers import Metrics
from megastruct.parallel.topology import Topology
from megastruct.run.guided_phase import guide_distances
from megastruct.run.run_folder import RunFolder
from megastruct.run.schedules import scheduled


def open_sources(config: Config, data: TrainingData) -> dict[str, ValidationSource]:
    """The sources of `evaluation.sources`, checked. Raises UserError with everything that is wrong with them."""
    options = DataOptions.of(config, RunFolder(config).path / FOLDER_NAME)
    paths = [path for path, _ in config.data.sources]
    taken = source_names(paths) if len(paths) > 1 else []
    problems = Problems(
        Problem(
            f"evaluation.sources.{name}",
            "is the name of a source of the training data, whose held-out part has the same metric",
            f"another name, such as {name}-2",
        )
        for name in config.evaluation.sources
        if name in taken
    )
    num_samples = config.evaluation.num_samples
    found = {
        name: problems.collect(partial(ValidationSource, options, data.tokenizer, name, path, num_samples))
        for name, path in config.evaluation.sources.items()
    }
    problems.raise_if_any()
    return {name: source for name, source in found.items() if source}


class Validation:
    """The held-out samples of this rank, and the losses on them."""

    def __init__(self, config: Config, topology: Topology, data: TrainingData, reads_data: bool) -> None:
        """`reads_data`: whether this rank's stage takes batches. Raises UserError if there is not enough data."""
        self.config, self.data = config, data
        replica = topology.dp_rank(dist.get_rank())
        num_samples, micro_batch_size = config.evaluation.num_samples, config.training.micro_batch_size
        self.sizes = (num_samples, micro_batch_size, replica, topology.dp_size)
        self.count = num_samples // (micro_batch_size * topology.dp_size)
        self.batches: list[Batch] = data.validation_batches(*self.sizes) if reads_data and num_samples else []
        opened = open_sources(config, data) if reads_data else {}
        self.of_sources = {name: source.batches(*self.sizes[1:]) for name, source in opened.items()}

    def metrics(self, engine: Engine, step: int) -> Metrics:
        """Losses of the structured model alone; with guides, the blended loss and their distances, too. Collective."""
        metrics: Metrics = {}
        if engine.guidance:
            metrics = {f"guide_distance/{name}": value for name, value in guide_distances(engine).items()}
        if not self.count:
            return metrics
        of_each_source = len(self.config.data.sources) > 1
        with engine.loss.recording(of_each_source) as rows:
            loss = engine.evaluate(self.batches, self.count)
        metrics |= {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
        if of_each_source:
            metrics |= self._source_losses(rows, engine.device)
        for name in self.config.evaluation.sources:
            metrics[f"validation_loss/{name}"] = engine.evaluate(self.of_sources.get(name, []), self.count)
        if engine.guidance:
            blended = scheduled(self.config, step).alpha
            metrics["validation_loss_guided"] = engine.evaluate(self.batches, self.count, blended)
        return metrics

    def _source_losses(self, rows: list[torch.Tensor], device: torch.device) -> Metrics:
        """The validation loss of each source of a mixture, from the loss of each row [micro_batch]. Collective."""
        sources = self.data.validation_sources(*self.sizes)
        totals = torch.zeros(len(sources), 2, dtype=torch.float64)  # sum and number of rows
        for total, mask in zip(totals, sources.values(), strict=True) if rows else []:
            own = torch.stack(rows).cpu().double()[torch.from_numpy(mask)]
            total += torch.stack((own.sum(), own.new_tensor(len(own))))
        totals = totals.to(device)
        # The ranks of a tensor-parallel group add equal rows, which leaves the means as they are.
        dist.all_reduce(totals)
        sums = zip(sources, totals.tolist(), strict=True)
        return {f"validation_loss/{name}": total / num_rows for name, (total, num_rows) in sums if num_rows}
