"""Top floor: the console commands. Each parses its arguments, checks them, calls the package and prints."""
