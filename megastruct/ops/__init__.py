"""Ground floor: the mathematics of structured matrices, each fast form beside a plain reference.

Letters: N inputs, M outputs of a linear map; R its rank.
"""
