"""First floor: the layers of the model apart from the linear maps of blocks, which are in `structures/`.

A layer is given its sizes and its tensor-parallel group, but no config, step or environment. Over a group of one rank
it is the layer of one process. A layer whose weights are drawn at random is a `Seeded` one, whose weights do not depend
on what else is built, in which order or where.
"""
