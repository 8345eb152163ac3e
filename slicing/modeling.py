"""The sliced model: a family's own causal LM with sliced decoder layers, as it runs, is saved and is loaded again.

A saved folder carries copies of this file and of `families.py`, so it imports nothing else of this project.
"""

import math
import os
from functools import cache, reduce, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .families import Block, Family, InputError, find_family


class SlicedConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of a sliced model.

    text_config: the whole config of the model that was sliced, its hidden size D included.
    widths: L widths d_i in [1, D], the hidden size that decoder layer i reads.
    rotations: 2 (a basis before attention and one before the MLP) or 1 (one basis a layer).
    gained_biases: paths, below a decoder layer, of the linear layers that have a bias only since slicing: the norm's.
    Raises ValueError where the widths don't fit the text_config.
    """

    model_type = "sliced"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    _auto_class = "AutoConfig"

    def __init__(
        self,
        text_config: Any = None,
        widths: list[int] | None = None,
        rotations: int = 2,
        gained_biases: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.widths = widths or []
        self.rotations = rotations
        self.gained_biases = gained_biases or []
        if text_config is not None:  # Transformers also builds a config without arguments, to tell defaults
            layers, hidden_size = text_config.num_hidden_layers, text_config.hidden_size
            fit = [isinstance(width, int) and 1 <= width <= hidden_size for width in self.widths]
            if len(fit) != layers or not all(fit):
                raise ValueError(f"widths must be {layers} integers from 1 to {hidden_size}, got {self.widths}")
            if rotations not in (1, 2):
                raise ValueError(f"rotations must be 1 or 2, got {rotations}")
            kwargs["tie_word_embeddings"] = text_config.tie_word_embeddings
        super().__init__(**kwargs)


class SlicedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A decoder layer that reads a stream of width d_i and writes one of width d_{i+1}.

    Takes over the modules of a dense layer of the family, gives those that touch the stream their new widths (with
    empty weights), and adds the shortcuts. Between the original basis and itself (width D) nothing changes and no
    shortcut stands.
    """

    dense_class: ClassVar[Any]  # the family's own layer

    def __init__(self, layer: nn.Module, family: Family, config: SlicedConfig, index: int, projected: bool) -> None:
        nn.Module.__init__(self)  # not the dense layer's, which `sliced_layer_class` puts behind this class
        self.__dict__.update(layer.__dict__)  # its modules, and attributes that the family's body or forward reads
        hidden_size = config.text_config.hidden_size
        width, self.next_width = [*config.widths, hidden_size][index : index + 2]
        self.block = find_block(layer, family)
        self.parallel = is_parallel(layer, self.block)
        self.returns_tuple = returns_tuple(layer)
        self.mlp_width = width
        if self.block.experts:  # they return the width that they read: zeros fill it up; grouped products take 16 bytes
            self.mlp_width = min(8 * math.ceil(max(width, self.next_width) / 8), hidden_size)
        narrow, two_bases = width < hidden_size, config.rotations == 2 and not self.parallel
        self.embedding_projection = self._linear(hidden_size, width) if projected and index == 0 else None
        self.attn_shortcut = self._linear(width, width) if narrow and two_bases else None
        self.mlp_shortcut = self._linear(width, self.next_width) if min(width, self.next_width) < hidden_size else None
        if narrow:
            self._read(family, config, width)
            if not self.parallel:
                resize(self, self.block.attention_out, width, writes=True)
        if self.next_width < hidden_size:
            writers = (*self.block.mlp_out, self.block.attention_out) if self.parallel else self.block.mlp_out
            for path in writers:
                resize(self, path, self.mlp_width if self.block.experts else self.next_width, writes=True)

    def _read(self, family: Family, config: SlicedConfig, width: int) -> None:
        """Give the norms and the matrices that read the stream their width."""
        for path in {self.block.attention_norm, self.block.mlp_norm}:
            narrow_norm(self, path, family, width, config.text_config.hidden_size)
        for paths, inputs in ((self.block.attention_in, width), (self.block.mlp_in, self.mlp_width)):
            for path in paths:
                resize(self, path, inputs)
                owner, name = matrix(self, path)
                if path in config.gained_biases or getattr(owner, "bias", None) is not None:
                    weight = getattr(owner, name)
                    owner.bias = nn.Parameter(weight.new_empty(weight.shape[-3 - input_axis(owner)]))

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        owner, name = matrix(self, self.block.attention_out)
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(getattr(owner, name).new_empty(outputs, inputs))
        return linear

    def __reduce__(self) -> tuple[Any, ...]:
        return empty_layer, (self.dense_class,), self.__dict__  # pickle can't find this class by its name

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (B, S, d_i) -> (B, S, d_{i+1}); all further arguments go to the attention module untouched."""
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        stream = hidden_states
        normed = part(self, self.block.attention_norm)(stream)
        attention, weights = attention_branch(self, self.block, normed, args, kwargs)
        if not self.parallel:
            if self.attn_shortcut is not None:
                stream = self.attn_shortcut(stream)
            stream = stream + attention
        if not self.parallel or self.block.mlp_norm != self.block.attention_norm:
            normed = part(self, self.block.mlp_norm)(stream)
        if self.mlp_width > normed.shape[-1]:
            normed = nn.functional.pad(normed, (0, self.mlp_width - normed.shape[-1]))
        mlp = mlp_branch(self, self.block, normed)[..., : self.next_width]
        if self.mlp_shortcut is not None:
            stream = self.mlp_shortcut(stream)
        stream = stream + attention + mlp if self.parallel else stream + mlp
        return (stream, weights) if self.returns_tuple else stream


class SlicedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A sliced causal LM. `model` is the family's own causal LM: its embeddings, body, final norm and head run as they
    are, with `SlicedLayer`s for layers, so that masks, caches, attention implementations and logits are the family's.

    The token table is (V, D) where it is tied to the head or shapes the body's output, else (V, d_0). With
    `output_hidden_states` the states are what the layers read, (B, S, d_i) (of layer 0 what the table gives), and last
    the body's output (B, S, D).
    """

    config_class = SlicedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules: ClassVar[list[str]] = ["SlicedLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache", "layer_past"]

    def __init__(self, config: SlicedConfig) -> None:
        super().__init__(config)
        # from_pretrained sets the wanted dtype as the default one; from_config would go by the text_config's
        self.model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        slice_modules(self.model, config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """What the family's own causal LM takes (its cache and `inputs_embeds` among `kwargs`) and returns."""
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        return self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() goes by the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The family's own: the token table keeps its width, and the head is resized with it."""
        return self.model.resize_token_embeddings(*args, **kwargs)  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        """The head (V, D), which reads the original basis."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the tensors under the names they have here: Transformers' renaming to the original checkpoints' names
        (Mixtral's `.mlp.` to `.block_sparse_moe.`) would hit the shortcuts too."""
        super().save_pretrained(save_directory, **({"save_original_format": False} | kwargs))


def slice_modules(model: PreTrainedModel, config: SlicedConfig) -> None:
    """Give a family's causal LM, in place, the layers and tables of a sliced model; changed weights are left empty."""
    family = find_family(config.text_config)
    narrow = config.widths[0] < config.text_config.hidden_size
    projected = narrow and (config.tie_word_embeddings or family.whole_tables)
    if narrow and not projected:
        for path in family.tables:
            table = part(model, path)
            table.embedding_dim = config.widths[0]
            table.weight = nn.Parameter(table.weight.new_empty(table.weight.shape[0], config.widths[0]))
            table._is_hf_initialized = False
    layers = part(model, family.layers)
    for index, layer in enumerate(layers):
        layers[index] = sliced_layer_class(layer.__class__)(layer, family, config, index, projected)


@cache
def sliced_layer_class(dense: Any) -> type[SlicedLayer]:
    """SlicedLayer as a subclass of the family's layer, the class by which Transformers captures hidden states."""
    return type("SlicedLayer", (SlicedLayer, dense), {"__module__": __name__, "dense_class": dense})


def empty_layer(dense: Any) -> SlicedLayer:
    """A SlicedLayer without content, to be filled by `copy` or `pickle`."""
    layer_class = sliced_layer_class(dense)
    return layer_class.__new__(layer_class)


def part(layer: nn.Module, path: str) -> Any:
    """The module or parameter at a dotted path."""
    return reduce(getattr, path.split("."), layer)


def matrix(layer: nn.Module, path: str) -> tuple[Any, str]:
    """The module that holds the matrix at a path, and the parameter's name: of a linear layer, a router, or the
    experts, whose parameters (experts, outputs, inputs) have no module of their own."""
    found = part(layer, path)
    if isinstance(found, nn.Parameter):
        owner, _, name = path.rpartition(".")
        return part(layer, owner), name
    return found, "weight"


def input_axis(owner: nn.Module) -> int:
    """The axis of a matrix that runs over its inputs; the outputs' is the other of the last two."""
    return -2 if isinstance(owner, Conv1D) else -1


def find_block(layer: nn.Module, family: Family) -> Block:
    """The first layout whose every name the layer has; InputError that names what the last one misses."""
    missing: list[str] = []
    for block in family.blocks:
        missing = [path for path in block.paths() if not has(layer, path)]
        if not missing:
            return block
    raise InputError(f"{type(layer).__name__} has no {', '.join(missing)}: the row in families.py doesn't fit")


def has(layer: Any, path: str) -> bool:
    """Whether there is something at a dotted path."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), layer) is not None


def is_parallel(layer: nn.Module, block: Block) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(getattr(layer, block.parallel)) if isinstance(block.parallel, str) else block.parallel


def returns_tuple(layer: nn.Module) -> bool:
    """Whether the family's body takes `[0]` of what a layer returns: those layers still take `output_attentions`."""
    return "output_attentions" in signature(type(layer).forward).parameters


def attention_branch(
    layer: nn.Module, block: Block, normed: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    """What attention adds to the stream (B, S, d), from the normalised stream, and the attention weights if given."""
    output = part(layer, block.attention)(normed, *args, **kwargs)
    hidden, weights = (output[0], output[1]) if isinstance(output, tuple) else (output, None)
    return _added(layer, block, hidden, block.dropout[0]), weights


def mlp_branch(layer: nn.Module, block: Block, normed: torch.Tensor) -> torch.Tensor:
    """What the MLP adds to the stream (B, S, d), from the normalised stream."""
    for path in block.mlp:
        normed = part(layer, path)(normed)
    return _added(layer, block, normed, block.dropout[1])


def _added(layer: nn.Module, block: Block, hidden: torch.Tensor, dropout: str | None) -> torch.Tensor:
    if dropout is not None and layer.training:
        chance = part(layer, dropout)
        hidden = chance(hidden) if isinstance(chance, nn.Module) else nn.functional.dropout(hidden, chance)
    return hidden * getattr(layer, block.scale) if block.scale else hidden


def resize(layer: nn.Module, path: str, width: int, writes: bool = False) -> None:
    """Give a matrix an empty weight that reads (or writes) `width` numbers, and its module the attributes to match."""
    owner, name = matrix(layer, path)
    weight = getattr(owner, name)
    shape = list(weight.shape)
    axis = input_axis(owner)
    shape[-3 - axis if writes else axis] = width
    setattr(owner, name, nn.Parameter(weight.new_empty(shape)))
    owner._is_hf_initialized = False  # a model made without a checkpoint still has to fill it
    if writes and getattr(owner, "bias", None) is not None:
        owner.bias = nn.Parameter(owner.bias.new_empty(width))
    for attribute in ("out_features", "nf", "hidden_dim") if writes else ("in_features", "nx", "hidden_dim"):
        if hasattr(owner, attribute):
            setattr(owner, attribute, width)


def narrow_norm(layer: nn.Module, path: str, family: Family, width: int, hidden_size: int) -> None:
    """Put an RMSNorm of `width` with weight 1 in a norm's place.

    The norm of a sliced stream divides by the original D: the mean of z^2 over d, plus eps D / d, is D / d times what
    it should be, and the constant sqrt(D / d) is in the matrices that read it.
    """
    norm = part(layer, path)
    dense_eps = getattr(norm, family.norm_eps) if isinstance(family.norm_eps, str) else family.norm_eps
    eps = dense_eps * hidden_size / width
    like = next(layer.parameters())
    if family.layer_norm:
        owner, _, name = path.rpartition(".")
        sliced = nn.RMSNorm(width, eps=eps, dtype=like.dtype, device=like.device)
        setattr(part(layer, owner) if owner else layer, name, sliced)
    else:
        norm.weight = nn.Parameter(like.new_full((width,), 1.0 - family.norm_offset))
        setattr(norm, str(family.norm_eps), eps)


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model's distinct parameters hold: shortcuts and head included, a tied table once."""
    return sum(parameter.numel() for parameter in model.parameters())
