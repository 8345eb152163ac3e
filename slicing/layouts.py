"""What a row of the table of families (families.py) is made of: names of a model's parts, and layouts of its layers.

Names are dotted paths: of `layers` and `tables` below the causal LM, of everything in a `Block` below the decoder
layer.

Imports nothing, since a saved sliced model carries a copy of this file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Names = dict[str, Any]  # fields of a Block

# the linear layers that only a sliced layer has
SHORTCUTS = ("embedding_projection", "attn_shortcut", "mlp_shortcut", "magnitude")


@dataclass(frozen=True)
class Block:
    """One layout of a decoder layer.

    A layer of one branch is parallel and has no attention or no MLP: there the names are empty, and both norms its one.
    Where a branch reads the stream as it is, the name of its norm is empty.
    """

    attention: str  # the attention module
    attention_norm: str
    attention_in: tuple[str, ...]  # matrices that read the normalised stream
    attention_out: str  # the matrix that writes to the stream
    mlp: tuple[str, ...]  # modules run one after another; where one gives a tuple, its first is meant
    mlp_norm: str  # the attention's own where a parallel block has one norm for both
    mlp_in: tuple[str, ...]
    mlp_out: tuple[str, ...]  # several in a mixture of experts
    attention_output_norm: str = ""  # an RMSNorm of what attention writes, before it is added to the stream
    mlp_output_norm: str = ""
    second: str = ""  # a mixer beside attention: it reads what attention reads, and what they write is added up
    second_out: str = ""
    multipliers: tuple[str, ...] = ()  # the layer's attributes for what attention reads, what it and the second write
    parallel: bool | str = False  # or the layer's attribute that says so
    experts: bool = False  # the MLP's modules return the width that they read
    beside: tuple[str, ...] = ()  # modules that read what the MLP reads, and whose outputs are added to the MLP's
    constant: bool = False  # the experts can't have the bias of the norm that they read: one channel is 1 for it
    residual: tuple[str, ...] = ()  # modules that would add the stream themselves: they are given 0 as `residual`
    scale: str | None = None  # the layer's attribute that multiplies what a branch adds to the stream
    dropout: tuple[str | None, str | None] = (None, None)  # after attention, after MLP: a module or probability, dotted

    def paths(self) -> tuple[str, ...]:
        """Every module or parameter named here."""
        norms = (self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm)
        modules = (self.attention, self.second, *self.mlp, *self.beside, *norms)
        return tuple(path for path in (*modules, *self.readers(), *self.writers()) if path)

    def readers(self) -> tuple[str, ...]:
        """The matrices that read the normalised stream."""
        return (*self.attention_in, *self.mlp_in)

    def writers(self) -> tuple[str, ...]:
        """The matrices that write to the stream."""
        return (*self.attention_outs(), *self.mlp_out)

    def attention_outs(self) -> tuple[str, ...]:
        """Those of attention and of a second mixer."""
        return tuple(path for path in (self.attention_out, self.second_out) if path)

    def norms(self) -> set[str]:
        """The norms of the stream."""
        return {self.attention_norm, self.mlp_norm} - {""}

    def output_norms(self) -> set[str]:
        """The norms of what the branches write."""
        return {self.attention_output_norm, self.mlp_output_norm} - {""}

    def output_norm(self, writer: str) -> str:
        """The norm between a matrix that writes and the stream; empty where there is none."""
        return self.mlp_output_norm if writer in self.mlp_out else self.attention_output_norm


@dataclass(frozen=True)
class Family:
    """One row: a model family whose decoder layers can be sliced."""

    layers: str  # the list of decoder layers
    tables: tuple[str, ...]  # embeddings that are added up to the stream, the token table first
    blocks: tuple[Block, ...]  # a layer has the first layout whose every name it has
    layer_norm: bool = False  # LayerNorm (centres), else RMSNorm
    norm_eps: str | float = "variance_epsilon"  # the norm's attribute, or the constant where it has none
    norm_offset: float = 0.0  # added to the norm's weight when it is applied
    whole_tables: bool = False  # the body shapes its output like its embeddings, or norms them: they keep their width
    refuse: Callable[[Any], str | None] = lambda config: None  # why a config of this family can't be sliced


# The names that Llama gave to most of its successors, and the common variations of them.
ATTENTION: Names = {
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": "self_attn.o_proj",
}
MLP: Names = {
    "mlp": ("mlp",),
    "mlp_norm": "post_attention_layernorm",
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
_LATENT = "self_attn.kv_a_proj_with_mqa"  # multi-head latent attention reads the stream by its down-projections
MLA = ATTENTION | {"attention_in": ("self_attn.q_a_proj", _LATENT)}
MLA_PLAIN_QUERY = ATTENTION | {"attention_in": ("self_attn.q_proj", _LATENT)}


def experts(
    router: str = "gate",
    *,
    shared: str | None = None,
    gate_up: str | None = None,
    also: str | None = None,
    module: str = "mlp",
    gated: bool = True,
) -> Names:
    """A mixture of experts: its router and stacked experts, the shared expert beside them, a further reader.

    gate_up: the one matrix of a shared expert that has its gate's and its up-projection in one. gated: the experts
    have a gate.
    """
    readers = [router, f"experts.{'gate_up_proj' if gated else 'up_proj'}"]
    writers = ["experts.down_proj"]
    if shared:
        both = [gate_up] if gate_up else ["gate_proj", "up_proj"] if gated else ["up_proj"]
        readers += [f"{shared}.{name}" for name in both]
        writers += [f"{shared}.down_proj"]
    if also:
        readers += [also]
    return {
        "mlp": (module,),
        "mlp_in": tuple(f"{module}.{name}" for name in readers),
        "mlp_out": tuple(f"{module}.{name}" for name in writers),
        "experts": True,
    }


def one_branch(norm: str, **names: Any) -> Names:
    """A layer with one branch: an attention or another mixer, or an MLP."""
    nothing: Names = {"attention": "", "attention_in": (), "attention_out": "", "mlp": (), "mlp_in": (), "mlp_out": ()}
    return nothing | {"attention_norm": norm, "mlp_norm": norm, "parallel": True} | names


def reads(block: Names, *names: str) -> Names:
    """An attention with further matrices that read the stream."""
    return block | {"attention_in": (*block["attention_in"], *names)}


def layer(**names: Any) -> Block:
    """Llama's layout and names, but for those given."""
    return Block(**(ATTENTION | MLP | names))


def decoder(
    *attentions: Names,
    mlps: Iterable[Names] = (MLP,),
    names: Names | None = None,
    **fields: Any,
) -> Family:
    """A family whose body keeps its parts where Llama's does, and whose layers have any of these attentions with any
    of these MLPs; `names` are those that all its layers have instead of Llama's."""
    mlps = tuple(mlps)
    blocks = tuple(
        Block(**(ATTENTION | MLP | attention | mlp | (names or {})))
        for attention in attentions or (ATTENTION,)
        for mlp in mlps
    )
    return Family(**({"layers": "model.layers", "tables": ("model.embed_tokens",), "blocks": blocks} | fields))
