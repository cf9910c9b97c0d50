"""Write metrics to metrics.jsonl, TensorBoard and, if wanted, Weights & Biases. Only rank 0 has writers."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megastruct.files import write_atomically
from megastruct.metrics.wandb_writer import WandbWriter

# key in metrics.jsonl -> TensorBoard tag. TensorBoard sorts the sections, and the curves of a section, by name; the
# numbers put what a reader looks at first to the top.
TENSORBOARD_TAGS: dict[str, str] = {
    "loss": "1_loss/train",
    "perplexity": "1_loss/train_perplexity",
    "z_loss": "1_loss/train_z",
    "validation_loss": "1_loss/validation",
    "validation_loss_guided": "1_loss/validation_guided",
    "validation_perplexity": "1_loss/validation_perplexity",
    "learning_rate": "2_optimizer/learning_rate",
    "grad_norm": "2_optimizer/grad_norm",
    "skipped_steps": "2_optimizer/skipped_steps",
    "skipped_data_steps": "2_optimizer/skipped_data_steps",
    "step_time_seconds": "3_speed/step_time_seconds",
    "tokens_per_second": "3_speed/tokens_per_second",
    "tflops_per_device": "3_speed/tflops_per_device",
    "mfu": "3_speed/mfu",
    "memory_bytes": "3_speed/memory_bytes",
    "data_wait_seconds": "3_speed/data_wait_seconds",
    "slowest_rank": "3_speed/slowest_rank",
    "slowest_compute_seconds": "3_speed/slowest_rank_compute_seconds",
    "slowest_data_wait_seconds": "3_speed/slowest_rank_data_wait_seconds",
    "slowest_waiting_seconds": "3_speed/slowest_rank_waiting_seconds",
    "median_compute_seconds": "3_speed/median_rank_compute_seconds",
    "median_data_wait_seconds": "3_speed/median_rank_data_wait_seconds",
    "tokens": "4_spent/tokens",
    "training_flops": "4_spent/training_flops",
    "wall_time_seconds": "4_spent/wall_time_seconds",
    "device_hours": "4_spent/device_hours",
    "skipped_documents": "5_data/skipped_documents",
    "alpha": "6_guided/alpha",
    "guide_share": "6_guided/share",
}

# Metrics of every source of the data: prefix of the key -> prefix of the tag; the source's name follows both.
TENSORBOARD_PREFIXES: dict[str, str] = {"validation_loss/": "1_loss/validation_of_"}

# Metrics of every linear, of which TensorBoard shows the mean and the maximum: prefix of the key -> prefix of the tag.
TENSORBOARD_SUMMARIES: dict[str, str] = {"guide_distance/": "6_guided/distance_"}

Metrics = dict[str, float | None]


class MetricWriter:
    """Writes one record per logged step. Records after `resume_step` are dropped, because those steps run again."""

    def __init__(self, folder: Path, resume_step: int, texts: dict[str, str], wandb: WandbWriter | None = None) -> None:
        """`folder`: the run folder. `texts`: title -> YAML or JSON, shown on TensorBoard's text page."""
        self.path, self._folder, self._wandb = folder / "metrics.jsonl", folder, wandb
        self._open(resume_step)
        for title, text in texts.items():
            self._board.add_text(title, "```\n" + text + "\n```", resume_step)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the values of one step, by key of `TENSORBOARD_TAGS` or with one of the prefixes above.

        None means unknown. A value that is not finite is written as None, because JSON cannot express it. TensorBoard
        gets no value for either.
        """
        metrics = {key: None if value is None or not math.isfinite(value) else value for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._show(step, metrics)
        if self._wandb:
            self._wandb.write(step, _shown(_known(metrics)))

    def go_back(self, step: int) -> None:
        """Drop the records after `step`, because those steps are trained again."""
        self._close_files()
        self._open(step)

    def _open(self, step: int) -> None:
        _truncate(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        begun = any(self._folder.glob("events.out.tfevents.*"))
        # In the run's own folder, so that TensorBoard shows the run by its name.
        self._board = SummaryWriter(str(self._folder), purge_step=step + 1)
        if not begun:  # a run from before has its events in a subfolder and under other tags: its curves begin anew
            for line in self.path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._show(record.pop("step"), record)

    def _show(self, step: int, metrics: Metrics) -> None:
        for tag, shown in _shown(_known(metrics)).items():
            self._board.add_scalar(tag, shown, step)
        self._board.flush()

    def close(self) -> None:
        """Close everything."""
        self._close_files()
        if self._wandb:
            self._wandb.close()

    def _close_files(self) -> None:
        self._file.close()
        self._board.close()


def _known(metrics: Metrics) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if value is not None}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """What TensorBoard shows, by tag."""
    single = {key: value for key, value in metrics.items() if not key.startswith(tuple(TENSORBOARD_SUMMARIES))}
    shown = {_tag(key): value for key, value in single.items()}
    for prefix, tag in TENSORBOARD_SUMMARIES.items():
        if values := [value for key, value in metrics.items() if key.startswith(prefix)]:
            shown |= {f"{tag}mean": sum(values) / len(values), f"{tag}max": max(values)}
    return shown


def _tag(key: str) -> str:
    for prefix, tag in TENSORBOARD_PREFIXES.items():
        if key.startswith(prefix):
            return tag + key.removeprefix(prefix)
    return TENSORBOARD_TAGS[key]


def _truncate(path: Path, resume_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        if record["step"] <= resume_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
