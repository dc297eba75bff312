"""Names to arrays, each loaded when it is asked for: what every reader of checkpoints returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from vlm_jax.weights import errors

Loader = Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Names to arrays, each loaded anew when it is asked for.

    Attributes:
      source: what was read, for messages.
      metadata: what the file says beside its tensors (GGUF key-values, safetensors metadata).
    """

    def __init__(self, loaders: Mapping[str, Loader], source: str, metadata=None):
        self._loaders, self.source, self.metadata = dict(loaders), source, metadata or {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Loads one.

        Raises:
          WeightsError: the file does not hold what its directory says.
        """
        load = self._loaders[name]
        try:
            return load()
        except (errors.WeightsError, OSError):
            raise
        except Exception as error:  # damaged bytes raise every kind
            raise errors.WeightsError(
                f"{self.source}: {name} cannot be read ({error!r}); fetch the file again"
            ) from error

    def __contains__(self, name: object) -> bool:  # the inherited one would load the tensor
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def renamed(self, rename: Callable[[str], str]) -> Tensors:
        """The same tensors under other names.

        Raises:
          WeightsError: two of them get one name.
        """
        loaders: dict[str, Loader] = {}
        for name in self._loaders:
            new = rename(name)
            if new in loaders:
                raise errors.WeightsError(f"{self.source}: {new} comes twice, once as {name}")
            loaders[new] = item(self, name)
        return Tensors(loaders, self.source, self.metadata)


def item(tensors: Mapping[str, np.ndarray], name: str) -> Loader:
    """Loads that tensor."""
    return lambda: tensors[name]
