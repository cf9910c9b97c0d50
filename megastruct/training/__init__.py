"""Fourth floor: the engine from a config, optimizer groups, schedules, and the optimizer's state as global tensors."""
