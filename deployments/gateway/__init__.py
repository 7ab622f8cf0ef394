"""The gateway: one pipeline for every request, whatever its protocol."""
