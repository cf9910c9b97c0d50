"""Ends the run, and names the rank, if a rank is lost, silent or hangs, so that no rank waits for another forever.

Every rank keeps one TCP connection to rank 0, from a thread of its own, and sends heartbeats over it; rank 0 answers.
Compiling, saving or evaluating in the main thread does not delay a heartbeat, so a heartbeat shows that the process is
alive. One file for each part:
- messages: what ranks send to each other, as lines of JSON;
- judgement: which rank is to blame, a pure function of what the ranks have said and the time;
- transport: the sockets;
- this_rank: what a process knows about itself, and how it ends;
- centre: the thread of rank 0;
- watch: the thread of the other ranks, and the interface for the training loop.

A new kind of evidence is one more field of `Heartbeat`, which `ThisRank.heartbeat` fills in and `judge` reads; nothing
between these two looks into a heartbeat.
"""

from __future__ import annotations

from megastruct.launch.watchdog.watch import Watch

__all__ = ["Watch"]
