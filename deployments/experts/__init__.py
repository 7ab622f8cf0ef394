"""Expert workers: routed experts, stateless between calls."""
