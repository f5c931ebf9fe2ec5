"""What an entry of the registry of families says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lighten.model.spec import Part


@dataclass(frozen=True, kw_only=True)
class Family:
    """The formula of one `model_type`.

    Attributes:
        describe: gives the parts of (config, architecture) in forward order, with the names that the checkpoint gives its tensors.
        architectures: the classes that it describes.
        elsewhere: classes of the same `model_type` in other code than transformers', which checkpoints name too.
    """

    describe: Callable[[Mapping[str, Any], str], tuple[Part, ...]]
    architectures: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
