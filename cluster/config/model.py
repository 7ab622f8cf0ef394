"""The section `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cluster.config.section import AutoDtype, Section, conflict


class ModelConfig(Section):
    """Which checkpoint is served, and as what."""

    path: Path = Field(description="Directory with config.json, safetensors shards (and index) and the tokenizer. "
                                   "A relative path is taken from the configuration file's folder.")
    name: str | None = Field(None, description="Name in /v1/models and in requests; the folder's name if not set.")
    dtype: AutoDtype = Field(
        "auto", description="Dtype of activations and unquantised weights; `auto` takes the checkpoint's.")
    aliases: tuple[str, ...] = Field((), description="More names that requests may use for the one model.")

    @property
    def served_name(self) -> str:
        """The name in /v1/models and in requests."""
        return self.name or self.path.name

    @model_validator(mode="after")
    def _every_alias_is_a_name_of_its_own(self) -> Self:
        for index, alias in enumerate(self.aliases):
            if not alias.strip():
                raise conflict(("aliases", index), "is empty: give a name, or leave it out")
            if alias == self.served_name:
                raise conflict(("aliases", index), f"{alias!r} is the model's name already: leave it out")
            if alias in self.aliases[:index]:
                raise conflict(("aliases", index), f"{alias!r} is listed twice: keep one")
        return self
