"""What a checkpoint's files hold: one set of weights, whole, all of it used."""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicing.families import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NO_SAFETENSORS = "it has no safetensors weights, and pickles (.bin, .pt) are not read, since they can run code"
# Buffers that older versions saved and newer ones compute.
_LEFTOVER = re.compile(
    r"(^|\.)(rotary_emb\..*|inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|token_type_ids|causal_mask"
    r"|masked_bias|(attn|attention|self_attention)\.bias)$"
)
# What quantisers store beside weights, and the names that they give to packed ones.
_SCALE = re.compile(
    r"[._](scales?|scale_inv|scale_[a-z]+|SCB|weight_format|absmax|quant_map|quant_state.*|zeros|qzeros|zero_points?|qweight"
    r"|g_idx|blocks|weight_packed|amax)$"
)
# Parts beside the text model that its own class leaves out.
_BESIDE = re.compile(r"(^|\.)(pooler|vision\w*|visual|audio\w*|image\w*|multi_modal\w*|\w*projector|mtp\w*)\.")
_NUMBERS = re.compile(
    r"F16|BF16|F32|F64|F8_E[45]M[32]\w*"
)  # safetensors' names of dtypes that weights can be cast from
_WEIGHT = re.compile(r"(weight|bias|_proj)$")  # the last one of experts in one tensor

log = logging.getLogger(__name__)


def check_files(folder: Path, *, chosen: str | None = None) -> None:
    """Refuse a folder that does not hold one whole set of safetensors weights, before they are read.

    chosen: the file or index that config.json names as `transformers_weights`.
    Raises InputError for an adapter, several sets of weights, an index that is damaged, files that are missing, pickles
    alone, and integers for weights.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{str(folder)!r} holds an adapter (adapter_config.json), which would be loaded over its weights: merge it"
            " and save the whole model to a folder of its own, or take the adapter's files away"
        )
    single, index = folder / SINGLE, folder / INDEX
    if chosen is not None:
        single = index = folder / chosen
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [name for name in present if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if index.exists() and index.name.endswith(".json"):
        listed = _listed(index)
        if single.exists() and single != index and listed != {single.name}:
            raise _two_sets(folder, single.name, f"{index.name} with {len(listed)} files")
        missing = sorted(name for name in listed if not (folder / name).exists())
        if missing:
            some = ", ".join(missing[:3])
            raise InputError(f"the model {str(folder)!r} lacks {len(missing)} of {len(listed)} weight files: {some}")
    elif single.exists():
        listed = {single.name}
        if shards and chosen is None:
            raise _two_sets(folder, single.name, f"{shards[0]}, which no {index.name} lists")
    elif shards:
        raise InputError(f"the model {str(folder)!r} has {len(shards)} weight files but no {index.name}: copy it again")
    else:
        why = f"it has {present[0]}, but no {SINGLE} or {INDEX}" if present else NO_SAFETENSORS
        raise InputError(f"the weights of {str(folder)!r} can't be read: {why}")
    for name in sorted(listed):
        _check_dtypes(folder / name)
    others = [name for name in present if name not in listed]
    if others:
        log.warning("%s: %s is read, not %s", folder, ", ".join(sorted(listed)[:3]), ", ".join(others[:3]))


def check_used(name: str, model: "PreTrainedModel", info: dict[str, Any], *, composite: str | None = None) -> None:
    """Refuse a model that its checkpoint does not fill, or fills with a part of what belongs to it.

    info: what `from_pretrained` found. composite: the model_type of the whole that this is the text model of. Tensors
    that lie beside the text model (another head, a vision tower, layers that predict more than one token) are told on
    stderr; buffers that newer versions compute are passed over.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(key[0]) for key in info["mismatched_keys"])
    if composite is not None and missing:
        raise InputError(
            f"the text model of {name!r} ({composite}) can't be loaded by itself: {len(missing)} of its tensors, such"
            f" as {missing[0]!r}, have other names in the checkpoint; save it as a model of its own"
        )
    if missing or mismatched:
        wrong = f"{len(missing)} tensors missing, {len(mismatched)} of another shape than config.json says"
        raise InputError(f"the weights of {name!r} are damaged: {wrong}, such as {(missing + mismatched)[0]!r}")
    unused = info["unexpected_keys"]
    left = sorted(key for key in unused if not _LEFTOVER.search(key) and key not in _tied_head(model))
    if scales := [key for key in left if _SCALE.search(key)]:
        raise InputError(
            f"the weights of {name!r} are quantised, though config.json does not say so: {len(scales)} tensors say how"
            f" others are to be scaled, such as {scales[0]!r}; slice the original and quantise the result"
        )
    if parts := [key for key in left if _belongs(model, key, composite is not None)]:
        layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
        raise InputError(
            f"{len(parts)} tensors of {name!r} are not used, such as {parts[0]!r}: config.json describes another model"
            f" than the weights ({layers} layers, {type(model).__name__})"
        )
    if composite is not None:
        log.warning(
            "%s is a %s: its text model is loaded alone, as a %s; what sees or hears (%d tensors) is left out, and what"
            " is measured and saved takes text only",
            name, composite, model.config.model_type, len(left),
        )  # fmt: skip
    elif left:
        log.warning("%s: %d tensors of the checkpoint are not used, such as %s", name, len(left), left[0])


def _listed(index: Path) -> set[str]:
    """The names of the files in an index."""
    damaged = f"{str(index)!r} is damaged"
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = set(content["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{damaged}: copy the model again") from error
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong or not names:
        raise InputError(
            f"{damaged} (its weight_map names the file {wrong[0] if wrong else None!r}): copy the model again"
        )
    if not isinstance(content.get("metadata"), dict):
        raise InputError(f'{damaged}: it has no "metadata"; copy the model again, or add "metadata": {{}}')
    return names


def _two_sets(folder: Path, one: str, other: str) -> InputError:
    return InputError(
        f"{str(folder)!r} holds two sets of weights, {one} and {other}: take away the one that is not meant"
    )


def _check_dtypes(file: Path) -> None:
    """Refuse weights that are integers, truth values or packed: without their scales they are no numbers of a model."""
    try:
        with file.open("rb") as stream:
            header: Any = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), file.stat().st_size)))
        kinds = {key: str(entry.get("dtype")) for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # reading says so
    weights = [key for key in sorted(kinds) if _WEIGHT.search(key) and not _LEFTOVER.search(key)]
    found = [key for key in weights if not _NUMBERS.fullmatch(kinds[key])]
    if found:
        raise InputError(
            f"{len(found)} weights in {str(file)!r} are integers or packed, such as {found[0]!r} ({kinds[found[0]]}):"
            " it is quantised; slice the original and quantise the result"
        )


def _tied_head(model: "PreTrainedModel") -> set[str]:
    """Names of a head's weight that is the token table's."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not table.weight:
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def _belongs(model: "PreTrainedModel", key: str, composite: bool) -> bool:
    """Whether a tensor is one of the model's modules', of its layers', or of another part of its body; of a composite's
    body much is beside its text model."""
    from torch.nn import ModuleList

    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    body = model.base_model
    names = {key, key.removeprefix(prefix), prefix + key}  # a checkpoint of the body alone has no prefix
    for name in names:
        for list_name in [name for name, module in modules.items() if isinstance(module, ModuleList)]:
            index = name.removeprefix(f"{list_name}.").partition(".")[0]
            if name.startswith(f"{list_name}.") and index.isdecimal():
                return not _predicts_more(model, len(list(modules[list_name].children())), int(index))
        owner = name.rpartition(".")[0]
        if owner in modules and modules[owner] is not model and modules[owner] is not body:
            return True
    return not composite and key.startswith(prefix) and body is not model and not _BESIDE.search(key)


def _predicts_more(model: "PreTrainedModel", layers: int, index: int) -> bool:
    """Whether a layer behind the last one is one of those that predict further tokens, as config.json counts them."""
    more = getattr(model.config.get_text_config(decoder=True), "num_nextn_predict_layers", None) or 0
    return layers <= index < layers + more
