"""Parts of a model that aren't trained, declared once by the names of their parameters."""

from __future__ import annotations

import abc
from typing import Any, TypeVar, final

from torch import nn

from pipeline.errors import ConfigError

FreezableT = TypeVar("FreezableT", bound="Freezable")


class _FreezeAfterInit(abc.ABCMeta):
    """Applies `frozen` to every instance once its whole constructor has run, so that all parameters exist."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__call__(*args, **kwargs)
        module._freeze()
        return module


class Freezable(nn.Module, metaclass=_FreezeAfterInit):
    """A module that declares its frozen parts as `frozen`.

    Everything else follows from that: frozen parameters have `requires_grad` False, and frozen modules stay in
    evaluation mode, without drop path or dropout, whatever mode the rest is in.
    """

    @property
    def frozen(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that aren't trained, such as "trunk."; they stay in checkpoints."""
        return ()

    @final
    def trainable(self, name: str) -> bool:
        """Whether parameter `name` is trained."""
        return not name.startswith(self.frozen) if self.frozen else True

    def train(self: FreezableT, mode: bool = True) -> FreezableT:
        """Set training mode, except for frozen modules, which stay in evaluation mode."""
        super().train(mode)
        frozen = self.frozen
        for name, part in self.named_modules() if mode and frozen else ():
            if f"{name}.".startswith(frozen):
                part.training = False
        return self

    def _freeze(self) -> None:
        """Raise ConfigError for a prefix that fits no parameter's name."""
        names = [name for name, _ in self.named_parameters()]
        for prefix in self.frozen:
            if not any(name.startswith(prefix) for name in names):
                heads = ", ".join(dict.fromkeys(name.split(".")[0] + ("." if "." in name else "") for name in names))
                raise ConfigError(
                    f"no parameter's name begins with {prefix!r}", where="options.freeze", fix=f"names begin {heads}"
                )
        for name, parameter in self.named_parameters():
            if not self.trainable(name):
                parameter.requires_grad_(False)
        self.train(self.training)
