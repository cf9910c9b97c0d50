"""First floor: the layers of the model that are no linear maps of a block; those are in `structures/`.

A layer is handed its sizes and its tensor-parallel group: no config, no step, no environment. A group of one rank makes
it the layer of one process. A layer whose weights are drawn has `init_weights(names)`: it fills them from the random
streams named by `names` (the seed and the layer's full name), so that the weights do not depend on what else is built,
in which order or where.
"""
