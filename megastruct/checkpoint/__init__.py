"""First floor: checkpoints on disk. Tensors and plain values go in and come out; no engine is known here.

sharded.py      a rank's part of a global tensor, as torch.distributed.checkpoint writes and reads it
store.py        a checkpoint written by all ranks, complete or absent; read by as many as there are then
checksums.py    what was written is what is read: sizes and SHA-256 of all files
intact.py       the newest checkpoint whose files are as they were written
reading.py      reading that cannot execute code
background.py   writing while training goes on
agreement.py    an error of one rank is an error of all
"""
