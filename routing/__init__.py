"""Where a token or a request goes: wire format, dispatch/combine, placement. No Ray, no vLLM."""
