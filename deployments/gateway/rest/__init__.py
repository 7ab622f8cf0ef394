"""The REST protocol: HTTP to the pipeline and back."""
