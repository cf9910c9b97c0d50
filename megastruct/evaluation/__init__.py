"""Fifth floor: what a model is worth."""
