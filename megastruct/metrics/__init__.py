"""First floor: what is measured, under which names, and where it is written."""
