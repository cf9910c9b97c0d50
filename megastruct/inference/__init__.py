"""Fourth floor: using a trained model."""
