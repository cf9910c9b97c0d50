"""Ground floor: what a run will cost, from its config alone: FLOPs, memory, traffic, stages, steps. Loads no torch."""
