"""Attention replicas: vLLM engines without the routed experts."""
