"""Top floor: the console commands. Each parses and checks its arguments, calls the package, and prints."""
