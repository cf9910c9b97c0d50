"""Documents that a thread or processes tokenise ahead of the trainer.

Every stream has its own queue, so the order depends on the streams alone: the rows are the same for any number of
processes, and for none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

from megastruct.data.read_ahead import Maker
from megastruct.data.text.chunks import Chunks, Signs
from megastruct.data.text.processes import TextProcess
from megastruct.data.text.stream import Placed, StreamCursor, TextSource, tokenised_documents
from megastruct.data.text.worker import Reading, StreamName

_CHUNKS_AHEAD_OF_A_THREAD = 1


def open_chunks(
    owner: object, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor], num_workers: int
) -> dict[StreamName, Chunks]:
    """The tokenised documents of all streams, from `starts` on, by `num_workers` processes; with 0, by a thread.

    The processes end when `owner` is collected, and when this process ends in any way.
    """
    if num_workers and starts:
        return _from_processes(owner, sources, starts, num_workers)
    return _from_thread(owner, sources, starts)


def _from_processes(
    owner: object, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor], num_workers: int
) -> dict[StreamName, Chunks]:
    names = list(starts)
    chunks: dict[StreamName, Chunks] = {}
    for index in range(min(num_workers, len(names))):
        own = names[index::num_workers]
        process = TextProcess(sources, {name: starts[name] for name in own})
        weakref.finalize(owner, process.close)
        chunks |= {
            name: Chunks(process.supply(name), 0, name, process, sources[name[0]].patience_seconds) for name in own
        }
    return chunks


def _from_thread(
    owner: object, sources: Sequence[TextSource], starts: dict[StreamName, StreamCursor]
) -> dict[StreamName, Chunks]:
    """One thread for all streams; a stream starts when it is first read. SentencePiece releases the GIL."""
    maker, signs = Maker(owner, "tokenise"), Signs()
    return {
        name: Chunks(
            maker.supply(_noted(sources, name, start, signs)),
            _CHUNKS_AHEAD_OF_A_THREAD,
            name,
            signs,
            sources[name[0]].patience_seconds,
        )
        for name, start in starts.items()
    }


def _noted(
    sources: Sequence[TextSource], name: StreamName, start: StreamCursor, signs: Signs
) -> Iterator[list[Placed]]:
    watch: Callable[[str, str], None] = lambda uri, failure: signs.heard(Reading(name, uri, failure))  # noqa: E731
    for documents in tokenised_documents(sources[name[0]], name[1], start, watch):
        signs.heard()
        yield documents
