"""Fifth floor: how good a model is."""
