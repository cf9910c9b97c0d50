"""Fifth floor: one run: its folder, its checkpoints, what it checks before it starts, and when it goes back."""
