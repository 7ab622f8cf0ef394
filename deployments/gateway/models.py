"""The models that clients see: one checkpoint, under its name and its further names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from cluster.errors import ModelNotFound
from deployments.gateway.upstream.pool import longest_context
from routing.requests.request import ReplicaLoad, Tenant

_OWNER = "deepsplit"


class ModelObject(TypedDict):
    """Describes a model as OpenAI's API does, with vLLM's `max_model_len`."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelPages:
    """Answers questions about the models, for every protocol. Nothing is asked of a replica."""

    def __init__(self, names: tuple[str, ...], created: int, loads: Callable[[], list[ReplicaLoad]]) -> None:
        """`names`: the model's name, then its further ones. `created`: Unix time in seconds."""
        self._names = names
        self._created = created
        self._loads = loads

    def visible(self, tenant: Tenant) -> list[ModelObject]:
        """Returns the models that the tenant may use."""
        if not may_use(tenant, self._names):
            return []
        return [
            ModelObject(
                id=name, object="model", created=self._created, owned_by=_OWNER, root=self._names[0], parent=None,
                max_model_len=longest_context(self._loads()),
            )
            for name in self._names
        ]  # fmt: skip

    def retrieve(self, tenant: Tenant, name: str) -> ModelObject:
        """Returns the model under one of its names. Raises ModelNotFound."""
        for model in self.visible(tenant):
            if model["id"] == name:
                return model
        raise no_model(name, self._names)


def may_use(tenant: Tenant, names: tuple[str, ...]) -> bool:
    """Returns whether the tenant may use the model of these names."""
    return tenant.models is None or bool(set(names) & set(tenant.models))


def no_model(name: str, names: tuple[str, ...]) -> ModelNotFound:
    """Returns the error for a name that is none of the model's."""
    return ModelNotFound(f"the model {name!r} does not exist; this server has {names[0]!r}")
