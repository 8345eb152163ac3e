"""Dynamic slicing of decoder LLMs by layer redundancy (EMNLP 2024 Findings), on PCA rotations as in SliceGPT.

The names below are imported when they are first used: the scripts check their arguments before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicing.bases import dense_bases as dense_bases
    from slicing.families import InputError as InputError
    from slicing.likelihood import perplexity as perplexity
    from slicing.loading import load_model as load_model
    from slicing.modeling import SlicedForCausalLM as SlicedForCausalLM
    from slicing.modeling import count_parameters as count_parameters
    from slicing.redundancy import LayerRedundancy as LayerRedundancy
    from slicing.redundancy import layer_redundancy as layer_redundancy
    from slicing.rotation import rotate_and_slice as rotate_and_slice
    from slicing.rotation import slice_with_bases as slice_with_bases
    from slicing.schedule import final_slices as final_slices
    from slicing.schedule import slice_widths as slice_widths
    from slicing.text import token_windows as token_windows

__version__ = "0.2.0"

_MODULES = {
    "likelihood": ("perplexity",),
    "families": ("InputError",),
    "loading": ("load_model",),
    "modeling": ("SlicedForCausalLM", "count_parameters"),
    "redundancy": ("LayerRedundancy", "layer_redundancy"),
    "bases": ("dense_bases",),
    "rotation": ("rotate_and_slice", "slice_with_bases"),
    "schedule": ("final_slices", "slice_widths"),
    "text": ("token_windows",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
