"""Balancing of experts against DeepSeek's EPLB."""
