"""What runs: the Ray Serve deployments and the vLLM plugin. Only this package imports vLLM."""
