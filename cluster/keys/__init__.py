"""API keys and the file that lists their hashes."""
