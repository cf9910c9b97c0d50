"""Ground floor: the layout of ranks, process groups, and random seeds that do not depend on either."""
