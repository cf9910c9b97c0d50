"""Fourth floor: one run, with its folder, its checkpoints, its checks before the start and its way back from spikes."""
