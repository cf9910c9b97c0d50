"""First floor: what is measured, what the metrics are called, and where they are written."""
