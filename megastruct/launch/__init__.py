"""First floor: how processes come to be, and what they find in their environment."""
