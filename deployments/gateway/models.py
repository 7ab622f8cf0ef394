"""The models that clients see: one checkpoint, under its name and its further names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from cluster.errors import ModelNotFound
from routing.requests.request import ReplicaLoad, Tenant

_OWNER = "deepsplit"


class ModelObject(TypedDict):
    """A model as OpenAI's API shows it, with vLLM's `max_model_len`."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelPages:
    """`list` and `retrieve`, for every protocol. Queries only; nothing is asked of a replica."""

    def __init__(self, names: tuple[str, ...], created: int, loads: Callable[[], list[ReplicaLoad]]) -> None:
        """`names`: the model's name, then its further ones. `created`: Unix time in seconds."""
        self._names = names
        self._created = created
        self._loads = loads

    def visible(self, tenant: Tenant) -> list[ModelObject]:
        """The models that the tenant may use."""
        if tenant.models is not None and not set(self._names) & set(tenant.models):
            return []
        length = max((load.max_model_len for load in self._loads()), default=0) or None
        return [
            ModelObject(
                id=name, object="model", created=self._created, owned_by=_OWNER, root=self._names[0], parent=None,
                max_model_len=length,
            )
            for name in self._names
        ]  # fmt: skip

    def retrieve(self, tenant: Tenant, name: str) -> ModelObject:
        """One of them. Raises ModelNotFound."""
        for model in self.visible(tenant):
            if model["id"] == name:
                return model
        raise ModelNotFound(f"the model {name!r} does not exist; this server has {self._names[0]!r}")
