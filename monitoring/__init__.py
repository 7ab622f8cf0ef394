"""What operators see. A leaf: it imports nothing of the other packages."""
