"""First floor: starting processes, their environment, their signals, and the watch over them."""
