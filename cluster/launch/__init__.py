"""`deepsplit up`: the launcher and the processes that it owns."""
