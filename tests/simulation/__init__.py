"""A seeded simulation of the expert plane: the real client and membership on a virtual clock and network."""
