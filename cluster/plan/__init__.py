"""What would run where, and whether it fits."""
