"""What the ranks of a run gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from megastruct.run.agreement import gather_cursor
from ranks import own_device, run_ranks

CURSORS = [np.array([[3, 1], [-1, -1], [7, 0]]), np.array([[-1, -1], [0, 2**40], [7, 0]]), None]


def gathered() -> Any:
    return gather_cursor(CURSORS[dist.get_rank()], (3, 2), own_device())


def test_each_stream_stands_where_the_ranks_that_know_it_say() -> None:
    for cursor in run_ranks(3, gathered):  # the last one reads no data, as a later stage of a pipeline
        assert cursor.dtype == np.int64 and cursor.tolist() == [[3, 1], [0, 2**40], [7, 0]]
