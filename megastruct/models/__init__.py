"""Third floor: the decoder, as a plain model and as a pipeline of the same layers.

Comments give the shape at every change, in these letters: b micro-batch, s sequence, h hidden size, f FFN width, a
attention width (heads x head_dim), v vocabulary. Activations are sequence first, [s, b, h].
"""
