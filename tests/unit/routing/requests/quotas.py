"""What tests look up in a tenant's account."""

from __future__ import annotations

from routing.requests.quota import Quotas
from routing.requests.request import Tenant


def streams_of(quotas: Quotas, tenant: Tenant) -> int:
    """The tenant's requests in flight, waiting ones included."""
    account = quotas._accounts.get(tenant.name)
    return 0 if account is None else account.streams
