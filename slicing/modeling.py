"""The sliced model: a family's own causal LM with sliced decoder layers, as it runs, is saved and is loaded again.

Configuration, decoder layer, body, causal LM and classifier are classes for any family. `of_family` makes the class of
one family, which is a subclass of the family's own too: fields, forward, masks, caches and names of weights are its.

A saved folder carries copies of this file and of those that it imports, `families.py`, `layouts.py`, `parts.py` and
`narrow.py`, so they import nothing else of this project.
"""

import copy
import math
import os
from dataclasses import field
from functools import cache
from inspect import signature, unwrap
from itertools import combinations
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

from .families import FAMILIES, Family
from .narrow import (
    inner_matrices,
    magnitude_rows,
    narrow_norm,
    narrow_output_norm,
    resize,
    resize_inner,
    set_widths,
)
from .parts import (
    arguments_of,
    attention_branch,
    find_block,
    in_model,
    input_axis,
    is_parallel,
    matrix,
    mlp_branch,
    normalised,
    returns_tuple,
)


class OfFamily:
    """What is written once for all families, and is a subclass of the family's own class wherever it is used."""

    dense_class: ClassVar[Any] = None  # the family's own class
    any_family: ClassVar[Any]  # the class that was written

    def __reduce__(self) -> tuple[Any, ...]:
        return unfilled, (self.any_family, self.dense_class), self.__dict__  # pickle can't find the class by its name


class SlicedConfig(OfFamily, PretrainedConfig):  # type: ignore[misc]
    """Configuration of a sliced model: the fields of the model that was sliced, its hidden size D included, and these.

    dense_model_type: the model_type of the model that was sliced, a row of families.py.
    widths: L widths d_i in [1, D], the hidden size that decoder layer i reads.
    rotations: 2 (a basis before attention and one before the MLP) or 1 (one basis a layer).
    gained_biases: paths, below a decoder layer, of the linear layers that have a bias only since slicing: the norm's.
    inner_widths: L widths, what the last matrix of the MLP (or of each routed expert) reads; None: the model's own.
    embedding_size: the width of the token table, D or d_0; it follows from the other fields.
    Raises ValueError where these don't fit the other fields.
    """

    model_type = "sliced"
    _auto_class = "AutoConfig"

    dense_model_type: str = ""
    widths: list[int] = field(default_factory=list)
    rotations: int = 2
    gained_biases: list[str] = field(default_factory=list)
    inner_widths: list[int] | None = None
    embedding_size: int = 0

    def __new__(cls, **fields: Any) -> Self:
        """An instance of the family's class."""
        if cls.dense_class is not None:
            return object.__new__(cls)
        family = fields.get("dense_model_type")
        if family not in FAMILIES:
            raise ValueError(f"dense_model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
        if not fields.get("widths"):
            raise ValueError(f"widths must be a list with an integer for each layer, got {fields.get('widths')}")
        found: Self = unfilled(cls, CONFIG_MAPPING[family])
        return found

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.widths:  # Transformers also builds a config without arguments, to tell defaults
            self._complete()

    @classmethod
    def of(cls, dense: PretrainedConfig, **fields: Any) -> Self:
        """The configuration of a sliced model that has all that a dense one's says but where the model came from."""
        found: Self = unfilled(cls, CONFIG_MAPPING[dense.model_type])
        found.__dict__.update(copy.deepcopy(dense.__dict__))
        found.__dict__.pop("auto_map", None)
        own = {"widths": [], "rotations": 2, "gained_biases": [], "inner_widths": None}
        for name, value in (own | fields).items():
            setattr(found, name, value)
        found.name_or_path = ""
        found._complete()
        return found

    def dense(self) -> PretrainedConfig:
        """The configuration of the model that was sliced: all fields but those of slicing."""
        found = object.__new__(self.dense_class)
        own = {*SlicedConfig.__annotations__, "auto_map"}
        found.__dict__.update({name: value for name, value in copy.deepcopy(self.__dict__).items() if name not in own})
        found.architectures = None
        return found

    def _complete(self) -> None:
        """Check the fields of slicing, and fill in those that follow from others."""
        layers, hidden_size, widths = self.num_hidden_layers, int(self.hidden_size), self.widths
        fit = [isinstance(width, int) and 1 <= width <= hidden_size for width in widths]
        if len(fit) != layers or not all(fit):
            raise ValueError(f"widths must be {layers} integers from 1 to {hidden_size}, got {widths}")
        if self.rotations not in (1, 2):
            raise ValueError(f"rotations must be 1 or 2, got {self.rotations}")
        if self.inner_widths is not None:
            fit = [isinstance(width, int) and width >= 0 for width in self.inner_widths]
            if len(fit) != layers or not all(fit):
                raise ValueError(f"inner_widths must be {layers} integers from 0, got {self.inner_widths}")
        self.dense_model_type = str(self.dense_class.model_type)
        whole = getattr(self, "tie_word_embeddings", False) or FAMILIES[self.dense_model_type].whole_tables
        self.embedding_size = hidden_size if whole else widths[0]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also from the first versions' config.json, where the dense model's fields are nested as `text_config`."""
        if "text_config" in config_dict:
            own = {name: value for name, value in config_dict.items() if name != "text_config"}
            dense = config_dict["text_config"]
            config_dict = {**dense, **own, "dense_model_type": dense.get("model_type")}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its fields have the family's words, which Transformers would otherwise take for those of old code."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Without inner widths where they are the model's own."""
        found: dict[str, Any] = super().to_dict()
        if self.inner_widths is None:
            found.pop("inner_widths", None)
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save config.json, with the classes of this file by which the Auto classes open the folder."""
        module = __name__.rpartition(".")[2]
        self.auto_map = {model.auto.__name__: f"{module}.{model.__name__}" for model in MODELS}
        super().save_pretrained(save_directory, **kwargs)


class SlicedLayer(OfFamily, GradientCheckpointingLayer):  # type: ignore[misc]
    """A decoder layer that reads a stream of width d_i and writes one of width d_{i+1}.

    Takes over the modules of a dense layer of the family, gives those that touch the stream their new widths (with
    empty weights), and adds the shortcuts. Between the original basis and itself (width D) nothing changes and no
    shortcut stands.
    """

    def __init__(self, layer: nn.Module, family: Family, config: SlicedConfig, index: int, projected: bool) -> None:
        nn.Module.__init__(self)  # not the dense layer's, which `of_family` puts behind this class
        self.__dict__.update(layer.__dict__)  # its modules, and attributes that the family's body or forward reads
        hidden_size = config.hidden_size
        width, self.next_width = [*config.widths, hidden_size][index : index + 2]
        self.block = find_block(layer, family)
        self.parallel = is_parallel(layer, self.block)
        self.returns_tuple = returns_tuple(layer)
        self.arguments = arguments_of(layer, self.block.attention)
        self.mlp_width = width
        if self.block.experts:  # they return the width that they read: zeros fill it up; grouped products take 16 bytes
            least = max(width + self.block.constant, self.next_width)
            self.mlp_width = min(8 * math.ceil(least / 8), hidden_size)
        narrow, two_bases = width < hidden_size, config.rotations == 2 and not self.parallel
        self.embedding_projection = self._linear(hidden_size, width) if projected and index == 0 else None
        self.attn_shortcut = self._linear(width, width) if narrow and two_bases else None
        self.mlp_shortcut = self._linear(width, self.next_width) if min(width, self.next_width) < hidden_size else None
        if narrow:
            self._read(family, config, width)
            if not self.parallel:
                for path in self.block.attention_outs():
                    resize(self, path, width, writes=True)
                rows = 0 if two_bases else magnitude_rows(width)
                narrow_output_norm(self, self.block.attention_output_norm, family, width, rows)
        if self.next_width < hidden_size:
            narrow_output_norm(self, self.block.mlp_output_norm, family, self.next_width, 0)
            for path in self.block.attention_outs() if self.parallel else ():
                resize(self, path, self.next_width, writes=True)
            for path in self.block.mlp_out:
                resize(self, path, self.mlp_width if self.block.experts else self.next_width, writes=True)
        if self.block.experts:
            set_widths(self, self.block, hidden_size, self.mlp_width)
        if config.inner_widths is not None:
            resize_inner(self, self.block, config.inner_widths[index])

    def _read(self, family: Family, config: SlicedConfig, width: int) -> None:
        """Give the norms and the matrices that read the stream their width."""
        for path in self.block.norms():
            narrow_norm(self, path, family, width, config.hidden_size)
        for paths, inputs in ((self.block.attention_in, width), (self.block.mlp_in, self.mlp_width)):
            for path in paths:
                resize(self, path, inputs)
                owner, name = matrix(self, path)
                if name == "weight" and (path in config.gained_biases or getattr(owner, "bias", None) is not None):
                    weight = owner.weight
                    owner.bias = nn.Parameter(weight.new_empty(weight.shape[-3 - input_axis(owner)]))

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        owner, name = matrix(self, self.block.writers()[0])
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(getattr(owner, name).new_empty(outputs, inputs))
        return linear

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (B, S, d_i) -> (B, S, d_{i+1}); all further arguments go to the attention module untouched."""
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        stream = hidden_states
        normed = normalised(self, self.block.attention_norm, stream)
        attention, weights = attention_branch(self, self.block, normed, args, kwargs)
        if not self.parallel:
            if self.attn_shortcut is not None:
                stream = self.attn_shortcut(stream)
            stream = stream + attention
        if not self.parallel or self.block.mlp_norm != self.block.attention_norm:
            normed = normalised(self, self.block.mlp_norm, stream)
        if self.mlp_width > normed.shape[-1]:
            if self.block.constant:
                normed = nn.functional.pad(normed, (0, 1), value=1.0)
            normed = nn.functional.pad(normed, (0, self.mlp_width - normed.shape[-1]))
        mlp = mlp_branch(self, self.block, normed, self.next_width)
        if self.mlp_shortcut is not None:
            stream = self.mlp_shortcut(stream)
        stream = stream + attention + mlp if self.parallel else stream + mlp
        return (stream, weights) if self.returns_tuple else stream


class SlicedPreTrainedModel(OfFamily, PreTrainedModel):  # type: ignore[misc]
    """What the sliced models have in common: the family's own model runs as it is, with `SlicedLayer`s for layers, so
    that masks, caches, attention implementations and outputs are the family's.

    The token table is (V, D) where it is tied to the head or shapes the body's output, else (V, d_0). With
    `output_hidden_states` the states are what the layers read, (B, S, d_i) (of layer 0 what the table gives), and last
    the body's output (B, S, D).
    """

    config_class = SlicedConfig
    auto: ClassVar[Any]  # the Auto class that opens a saved one
    _no_split_modules: ClassVar[list[str]] = ["SlicedLayer"]
    _supports_attention_backend = True  # asked of the class in a folder, which is of no family yet

    def __new__(cls, config: SlicedConfig, *args: Any, **kwargs: Any) -> Self:
        """An instance of the family's class."""
        if cls.dense_class is not None:
            return object.__new__(cls)
        found: Self = unfilled(cls, dense_model_class(cls.auto, config))
        return found

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what loading computes anew is computed as in the family's own (buffers that are not saved)."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Transformers goes by the source that a class stands in: the family's."""
        return bool(cls.dense_class._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As for attention."""
        return bool(cls.dense_class._can_set_experts_implementation())

    def post_init(self) -> None:
        """Called at the end of the family's constructor: the dense modules are there."""
        slice_modules(self, self.config)
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Also from folders of the first versions, where the causal LM stood below `model`."""
        return super().from_pretrained(*args, **({"key_mapping": _FIRST_NAMES} | kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the tensors under the names they have here: Transformers' renaming to the original checkpoints' names
        (Mixtral's `.mlp.` to `.block_sparse_moe.`) would hit the shortcuts too.

        A model that the family's own config can describe is saved as the family's, without code (`plain_config`).
        """
        config = plain_config(self)
        if config is None:
            super().save_pretrained(save_directory, **({"save_original_format": False} | kwargs))
        else:
            _as_dense(self, config).save_pretrained(save_directory, **kwargs)


class SlicedModel(SlicedPreTrainedModel):
    """A sliced body: what it gives, the head reads."""

    auto = AutoModel
    _auto_class = "AutoModel"


class SlicedForCausalLM(SlicedPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A sliced causal LM."""

    auto = AutoModelForCausalLM
    _auto_class = "AutoModelForCausalLM"

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Transformers goes by the class's name: the family's."""
        return bool(cls.dense_class._supports_default_dynamic_cache())

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Older releases go by the class's name: Mamba's has another argument for the cache."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        taken = signature(unwrap(self.dense_class.forward)).parameters
        if "past_key_values" not in taken and "cache_params" in taken and "past_key_values" in model_kwargs:
            model_kwargs.setdefault("cache_params", model_kwargs.pop("past_key_values"))


class SlicedForSequenceClassification(SlicedPreTrainedModel):
    """A sliced body under a classifier, which a new one has still to learn."""

    auto = AutoModelForSequenceClassification
    _auto_class = "AutoModelForSequenceClassification"


MODELS = (SlicedModel, SlicedForCausalLM, SlicedForSequenceClassification)
_FIRST_NAMES = {r"^model\.(?=(?:model|transformer|gpt_neox|lm_head|embed_out)\.)": ""}


@cache
def of_family(sliced: Any, dense: Any) -> Any:
    """A class of this file for one family: a subclass of it and of the family's own class.

    By the latter Transformers captures hidden states, and finds what it tells apart by class. The Auto classes learn
    which models a configuration belongs to.
    """
    names = {"__module__": sliced.__module__, "dense_class": dense, "any_family": sliced}
    if issubclass(sliced, SlicedPreTrainedModel):
        names["_supports_attention_backend"] = dense._supports_attention_backend
    found: Any = type(sliced.__name__, (sliced, dense), names)
    if issubclass(sliced, SlicedConfig):
        for model in MODELS:
            model.auto.register(found, model, exist_ok=True)
    return found


def unfilled(sliced: Any, dense: Any) -> Any:
    """An instance without content of a family's class, to be filled by its constructor, `copy` or `pickle`."""
    return object.__new__(of_family(sliced, dense))


def dense_model_class(auto: Any, config: SlicedConfig) -> Any:
    """The class by which an Auto class opens the family's dense models; a classifier for families without one."""
    family = CONFIG_MAPPING[config.dense_model_type]
    if auto is AutoModelForSequenceClassification and family not in auto._model_mapping:
        return _classifier(AutoModel._model_mapping[family].__base__)
    return auto._model_mapping[family]


@cache
def _classifier(family: Any) -> Any:
    names = {"__module__": family.__module__, "base_model_prefix": family.base_model_prefix}
    return type("ForSequenceClassification", (GenericForSequenceClassification, family), names)


def slice_modules(model: PreTrainedModel, config: SlicedConfig) -> None:
    """Give a family's model, in place, the layers and tables of a sliced one; changed weights are left empty."""
    family = FAMILIES[config.dense_model_type]
    projected = config.embedding_size > config.widths[0]
    layers = in_model(model, family.layers)
    if isinstance(layers[0], SlicedLayer):  # a classifier's body, made as a sliced one
        return
    for path in family.tables:
        table = in_model(model, path)
        if isinstance(table, nn.Embedding):
            table.padding_idx = None  # or loading may set that row to 0, see `_loses_padding`
        if config.embedding_size < config.hidden_size:
            table.embedding_dim = config.embedding_size
            table.weight = nn.Parameter(table.weight.new_empty(table.weight.shape[0], config.embedding_size))
            table._is_hf_initialized = False
    for index, layer in enumerate(layers):
        layers[index] = of_family(SlicedLayer, layer.__class__)(layer, family, config, index, projected)


# What configs call an inner width. A family may have several: of its MLPs and of its experts.
_INNER_FIELDS = (
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "mlp_hidden_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "prefix_dense_intermediate_size",
)


def plain_config(model: SlicedPreTrainedModel) -> PretrainedConfig | None:
    """The family's own config of a sliced model whose stream is not narrower, with the inner widths it has now, and as
    `sliced_from` the numbers in whose place they stand.

    None where there is no such config: a width is cut, or its inner widths differ where the family has one number for
    them. Found by trying: the family's model of that config must have the same tensors. None too where loading such a
    checkpoint would change it.
    """
    config: SlicedConfig = model.config
    if any(width < config.hidden_size for width in config.widths):
        return None
    family, dense = FAMILIES[config.dense_model_type], config.dense()
    if _loses_padding(model, _empty(model, dense)):
        return None
    if config.inner_widths is None:
        return dense
    changed: dict[int, set[int]] = {}
    for layer, width in zip(in_model(_empty(model, dense), family.layers), config.inner_widths, strict=True):
        block = find_block(layer, family)
        for own, _ in inner_matrices(layer, block).values() if block.mlp_out else ():
            changed.setdefault(own, set()).add(width)
    if any(len(widths) > 1 for widths in changed.values()):
        return None
    names = [name for name in _INNER_FIELDS if getattr(dense, name, 0) in (None, *changed)]
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for count in range(len(names), 0, -1):  # mostly all: an expert's width may happen to be a shared one's
        for chosen in combinations(names, count):
            found = copy.deepcopy(dense)
            for name in chosen:
                own = getattr(found, name) or max(changed)
                setattr(found, name, *changed[own])
            shapes = {name: tensor.shape for name, tensor in _empty(model, found).state_dict().items()}
            if shapes == wanted:
                before = {name: getattr(dense, name) for name in chosen}
                found.sliced_from = before | getattr(dense, "sliced_from", {})  # of a model that was sliced before
                return found
    return None


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model that was sliced to one with this config, plain or not; the config itself where none
    was."""
    dense = config.dense() if isinstance(config, SlicedConfig) else config
    before = getattr(dense, "sliced_from", None)
    if not isinstance(before, dict) or not before.keys() <= {*_INNER_FIELDS}:
        return dense
    dense = copy.deepcopy(dense)
    for name, value in before.items():
        setattr(dense, name, value)
    del dense.sliced_from
    return dense


def _empty(model: SlicedPreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The family's own model of a config, without memory."""
    with torch.device("meta"):
        found: PreTrainedModel = model.dense_class(copy.deepcopy(config))
    return found


def _loses_padding(model: SlicedPreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether loading sets the row of a padding token to 0 that is something else here: the code of a family that
    initialises what a checkpoint lacks (Youtu's) may forget that it has this row."""
    for name, table in dense.named_modules():
        index = table.padding_idx if isinstance(table, nn.Embedding) else None
        if index is None or not model.get_submodule(name).weight[index].any():
            continue
        trial = nn.Embedding(index + 1, 1, padding_idx=index)
        nn.init.ones_(trial.weight)
        trial.weight.__dict__["_is_hf_initialized"] = True  # as a tensor that was read
        with torch.no_grad():
            dense._init_weights(trial)
        if not trial.weight[index].all():
            return True
    return False


def _as_dense(model: SlicedPreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The family's own model that shares a sliced one's parameters."""
    found = _empty(model, config)
    found.load_state_dict(model.state_dict(), assign=True)
    found.tie_weights()
    found.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return found


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model's distinct parameters hold: shortcuts and head included, a tied table once."""
    return sum(parameter.numel() for parameter in model.parameters())
