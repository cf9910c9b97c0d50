"""First floor: the layers of the model apart from the linear maps of blocks, which are in `structures/`.

A layer is given its sizes and its tensor-parallel group, but no config, step or environment. Over a group of one rank
it is the layer of one process. The first weights of a layer do not depend on what else is built, in which order or
where (`structures/sharded.py`, `ShardedModule`).
"""
