"""Ground floor: the costs of a run, from its config alone: FLOPs, memory, traffic, stages, steps. Loads no torch."""
