"""Second floor: the decoder as a list of named layers, and as one module; `engine/pipeline.py` cuts it into stages.

Comments give the shape at every change, in these letters: b micro-batch, s sequence, h hidden size, f FFN width, a
attention width (heads x head_dim), v vocabulary. Activations are sequence first, [s, b, h].
"""
