"""Requests: tenants and quotas, admission, fair queuing, replica choice. `slots` always means decode slots."""
