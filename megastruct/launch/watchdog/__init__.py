"""No rank waits for another one for ever: a rank that is lost, silent or hangs ends the run, and is named.

Every rank keeps one TCP connection to rank 0, from a thread of its own, and sends heartbeats over it; rank 0 answers.
The main thread does not delay a heartbeat while it compiles, saves or evaluates, so a heartbeat shows that the process
lives. One file for each part:
- messages: what ranks send to each other, as lines of JSON;
- judgement: who is to blame, a pure function of what the ranks have said and the time;
- transport: the sockets;
- this_rank: what a process knows about itself, and how it ends;
- centre: the thread of rank 0;
- watch: the thread of the other ranks, and the face for the training loop.

A new kind of evidence is one more field of `Heartbeat`, which `ThisRank.heartbeat` fills in and `judge` reads; nothing
between these two looks into a heartbeat.
"""

from __future__ import annotations

from megastruct.launch.watchdog.watch import Watch

__all__ = ["Watch"]
