"""The waiting room of one gateway, and the common admission of several."""
