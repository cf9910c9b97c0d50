"""Third floor: the model in DeepSpeed, its optimizer, and the optimizer's state."""
