"""Certificates, the TLS contexts made of them, and files that are read again when they change."""
