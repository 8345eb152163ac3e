"""Token windows that remember the text and the split that they are of, from reading them to results.json."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slicing.experiment.digests import windows_key

if TYPE_CHECKING:
    import torch

    from slicing.experiment.results import Text


@dataclass(frozen=True)
class Windows:
    """ids: token ids (N, S) of a split of a text. source: a known data set, a file, or demo."""

    source: str
    split: str
    ids: "torch.Tensor"

    @cached_property
    def key(self) -> str:
        """What the windows are known by, wherever they come from: shape and tokens."""
        return windows_key(self.ids)

    def first(self, count: int | None) -> "Windows":
        """The first so many of them; None: all."""
        return Windows(self.source, self.split, self.ids[:count])

    def entry(self) -> "Text":
        """What results.json says of them."""
        from slicing.experiment.results import Text

        count, length = self.ids.shape
        return Text(self.source, self.split, count, length, self.ids.numel())
