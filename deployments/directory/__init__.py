"""Who is there, and who holds which experts."""
