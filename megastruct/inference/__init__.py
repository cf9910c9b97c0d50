"""Fifth floor: loading a trained model and generating text with it."""
