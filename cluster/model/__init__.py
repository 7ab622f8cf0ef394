"""The model and its checkpoint, as files say it."""
