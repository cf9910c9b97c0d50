"""A rank's part of a global tensor, in the form that torch.distributed.checkpoint writes and reads.

DCP asks a tensor for its pieces through a protocol of three methods (torch/distributed/_checkpointable.py), which
DTensor has too. A piece is a cuboid of the global tensor and a view of the memory that holds it. Pieces express more
than a DTensor can: a dimension in several parts, cuts in two dimensions, and ZeRO's fragments, which begin and end
anywhere in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megastruct.parallel.shards import Box

MAX_PIECE_ELEMENTS = 2**24  # 64 MiB in fp32; a reader loads a stored piece into memory as a whole


class ShardedTensor(torch.Tensor):
    """The pieces that a rank holds of a tensor of `global_shape`, by their offsets in it."""

    global_shape: torch.Size
    pieces: dict[torch.Size, Tensor]

    @classmethod
    def of_fragment(
        cls, fragment: Tensor, start: int, local_shape: Sequence[int], global_shape: Sequence[int], boxes: list[Box]
    ) -> ShardedTensor:
        """Views of `fragment`, which is 1-D: the elements from `start` of a local tensor, flattened row by row.

        `boxes`: the parts of the global tensor that the local one holds. Elements in none of them (padding) are neither
        written nor read.
        """
        sharded = fragment.new_empty(0).as_subclass(cls)
        sharded.global_shape = torch.Size(global_shape)
        sharded.pieces = {}
        at = 0
        for offsets, sizes in flat_cuboids(local_shape, start, start + fragment.numel()):
            cuboid = fragment[at : at + math.prod(sizes)].view(sizes)
            at += cuboid.numel()
            for box in boxes:
                sharded._add(cuboid, offsets, box)
        return sharded

    def _add(self, cuboid: Tensor, offsets: Sequence[int], box: Box) -> None:
        """Add the intersection of `box` and `cuboid`, which starts at `offsets` of the local tensor."""
        where = []
        for dim, offset in enumerate(offsets):
            first = max(offset, box.local_offsets[dim])
            last = min(offset + cuboid.shape[dim], box.local_offsets[dim] + box.sizes[dim])
            if first >= last:
                return
            cuboid = cuboid.narrow(dim, first - offset, last - first)
            where.append(box.global_offsets[dim] + first - box.local_offsets[dim])
        self.pieces[torch.Size(where)] = cuboid

    def size(self, dim: int | None = None) -> Any:
        """The global size, which DCP compares with the stored size."""
        return self.global_shape if dim is None else self.global_shape[dim]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, piece.shape),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.global_shape,
                ),
            )
            for offsets, piece in self.pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.shape) for offsets, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def global_shape(tensor: Tensor) -> torch.Size:
    """The shape under which a checkpoint knows the tensor."""
    return tensor.global_shape if isinstance(tensor, ShardedTensor) else tensor.shape


def flat_cuboids(
    shape: Sequence[int], start: int, stop: int, max_elements: int = MAX_PIECE_ELEMENTS
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the cuboids that make up the elements [start, stop) of a row-major tensor, in their order.

    The rest of a first row, whole rows, the beginning of a last row: at most 2 n - 1 for n dimensions, and more where
    whole rows are cut so that a cuboid has no more than `max_elements` (one row at least).
    """
    if not shape:
        if start < stop:
            yield (), ()
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        num_rows = min((stop - start) // row, max(1, max_elements // row))
        if within or not num_rows:
            end = min(row, within + stop - start)
            for offsets, sizes in flat_cuboids(shape[1:], within, end, max_elements):
                yield (index, *offsets), (1, *sizes)
            start += end - within
        else:
            yield (index, *(0 for _ in shape[1:])), (num_rows, *shape[1:])
            start += num_rows * row
