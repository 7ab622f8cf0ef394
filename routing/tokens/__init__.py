"""Hidden states: wire format, dispatch and combine, placement of experts, membership of workers."""
