"""How addresses are written."""

from __future__ import annotations


def bracketed(host: str) -> str:
    """Returns the host as it stands before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
