"""Requests: tenants and quotas, admission, fair queuing, replica choice."""
