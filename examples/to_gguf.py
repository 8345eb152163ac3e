"""Write a model whose MLPs are cut, and whose stream is not, as a GGUF file for llama.cpp: inner widths may differ.

python examples/to_gguf.py results/demo-run/models/inner_0.3000-1a2b3c4d sliced.gguf --tokenizer parent.gguf
python examples/to_gguf.py sliced sliced.gguf --dtype f32

For Llama and Mistral models that `--mean 0 --inner-mean X --save-model best` saved, with or without code. The tokenizer
is the one in a GGUF file of the parent; without it the file holds none, and takes token numbers only. Inner widths that
differ by layer are written under the name `deci`, by which llama.cpp reads a width for each layer; equal ones as
`llama`. The file is for llama.cpp's own tools to quantise further.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicing import InputError, flags
from slicing.command_line import check_output, exit_code
from slicing.flags import flag

FAMILIES = ("llama", "mistral")
ROTATIONS = ("default", "linear", "llama3")  # those that are fixed factors of the frequencies


@dataclass(frozen=True)
class Options:
    """The options of this script, a field a flag."""

    model: str = flag(help="folder of the model", positional=True)
    output: str = flag(help="the .gguf file to write; one that is there is replaced", positional=True, is_path=True)
    tokenizer: str | None = flag(
        None, help="a GGUF file of the parent, whose tokenizer is taken over", default="none", is_path=True
    )
    dtype: str = flag("f16", help="of the matrices; norms and biases are f32", choices=("f16", "bf16", "f32"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    return exit_code(lambda: convert(flags.parse(Options, __doc__, argv)), "interrupted: the file is not whole")


def convert(options: Options) -> None:
    """Read, check, write, and say what was written."""
    check_output("the output", options.output, (".gguf",))
    tokenizer = tokenizer_fields(options.tokenizer) if options.tokenizer else {}
    from slicing import load_model

    model, _ = load_model(options.model, device="cpu")
    inner = inner_widths(model, options.model)
    held = len(tokenizer["tokenizer.ggml.tokens"][0]) if tokenizer else model.config.vocab_size
    if held != model.config.vocab_size:
        raise InputError(f"{options.tokenizer} has {held} tokens, {options.model} {model.config.vocab_size}")
    name = write(model, inner, tokenizer, options)
    widths = str(inner[0]) if len(set(inner)) == 1 else f"{min(inner)} to {max(inner)}"
    print(f"{options.output}: {name}, {len(inner)} layers of inner width {widths}, {options.dtype}")


def inner_widths(model: Any, name: str) -> list[int]:
    """The inner width of each layer. InputError for what this or llama.cpp has no place for."""
    config = model.config
    family = getattr(config, "dense_model_type", config.model_type)
    if family not in FAMILIES:
        raise InputError(f"{name} is a {family}: this recipe writes {' and '.join(FAMILIES)}")
    narrow = [width for width in getattr(config, "widths", ()) if width < config.hidden_size]
    if narrow:
        raise InputError(
            f"{len(narrow)} of {config.num_hidden_layers} layers of {name} read fewer than {config.hidden_size}"
            " numbers: llama.cpp knows no shortcuts; slice with --mean 0 --inner-mean X"
        )
    rotation = config.rope_parameters["rope_type"]
    if rotation not in ROTATIONS:
        raise InputError(f"{name} has rotary positions of type {rotation}: this recipe writes {', '.join(ROTATIONS)}")
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


def tokenizer_fields(path: str) -> dict[str, tuple[Any, Any, Any]]:
    """What a GGUF file says of its tokenizer: value, type and type of elements by key."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields.values()
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {path!r} can't be read: give a GGUF file of the parent") from error
    found = {
        field.name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in fields
        if field.name.startswith("tokenizer.")
    }
    if "tokenizer.ggml.tokens" not in found:
        raise InputError(f"--tokenizer {path!r} holds no tokenizer: give a GGUF file of the parent")
    return found


def write(model: Any, inner: list[int], tokenizer: dict[str, tuple[Any, Any, Any]], options: Options) -> str:
    """Write the file; returns the name by which llama.cpp reads it."""
    import gguf

    config, equal = model.config, len(set(inner)) == 1
    arch = gguf.MODEL_ARCH.LLAMA if equal else gguf.MODEL_ARCH.DECI
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(options.output, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(Path(options.model).resolve().name)
    window = getattr(config, "sliding_window", None)  # which llama.cpp's model of this kind has not: no text is longer
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(len(inner))
    writer.add_feed_forward_length(inner[0] if equal else inner)
    writer.add_head_count(heads if equal else [heads] * len(inner))
    writer.add_head_count_kv(groups if equal else [groups] * len(inner))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, (value, kind, elements) in tokenizer.items():
        writer.add_key_value(key, value, kind, elements)
    if not tokenizer:
        writer.add_tokenizer_model("no_vocab")

    stored = {"f32": "F32", "f16": "F16", "bf16": "BF16"}[options.dtype]
    kind = gguf.GGMLQuantizationType[stored]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if stored == "F32" else f"MOSTLY_{stored}"])
    names = gguf.get_tensor_name_map(arch, len(inner))
    for name, numbers in tensors(model):
        stored_name = names.get_name(name, (".weight", ".bias")) or name
        if numbers.ndim > 1:
            writer.add_tensor(stored_name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(gguf.MODEL_ARCH_NAMES[arch])


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and fp32 numbers. llama.cpp turns neighbouring numbers of a head together, Transformers those half a head
    apart: the rows of queries and keys change places."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = tensor.float()
        if count := heads.get(name.split(".")[-2]):
            numbers = numbers.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, numbers.numpy()
    rotary = model.model.rotary_emb.inv_freq
    size = 2 * len(rotary)
    plain = config.rope_parameters["rope_theta"] ** -(rotary.new_tensor(range(0, size, 2)) / size)
    if not plain.allclose(rotary):
        yield "rope_freqs.weight", (plain / rotary).numpy()


if __name__ == "__main__":
    sys.exit(main())
