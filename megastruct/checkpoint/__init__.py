"""First floor: checkpoints on disk. Tensors and plain values go in and come out; no engine is known here."""
