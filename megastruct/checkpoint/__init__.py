"""First floor: checkpoints on disk. They hold tensors and plain values, and do not depend on the engine.

sharded.py      a rank's part of a global tensor, as torch.distributed.checkpoint writes and reads it
store.py        a checkpoint that all ranks write, complete or absent, and that any number of ranks reads
checksums.py    sizes and SHA-256 of all files, to detect damage
intact.py       finds the newest checkpoint whose files are undamaged
reading.py      reads checkpoints without executing code from them
background.py   writes while training continues
agreement.py    turns an error of one rank into an error of all
"""
