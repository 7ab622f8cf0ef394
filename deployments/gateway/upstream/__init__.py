"""Requests on their way to attention replicas and back."""
