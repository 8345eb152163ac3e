"""The checks of a run's options that need no weights: what is wrong is said before they are loaded."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slicing.experiment.inputs import Inputs, check_positions, positions_of, read_vector
from slicing.experiment.options import Options
from slicing.experiment.windows import Windows
from slicing.families import InputError, find_family
from slicing.flags import check_limits
from slicing.schedule import (
    check_vector,
    final_slices,
    highest_inner_cut,
    inner_widths,
    normalise,
    rounded_down,
    sweep_amounts,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from slicing.experiment.results import VectorFile
    from slicing.families import Family

REDUNDANCY_WINDOWS, REDUNDANCY_LENGTH, REDUNDANCY_SPLIT = 128, 1024, "validation"  # where no vector is given


def check(options: Options) -> Inputs:
    """Raise InputError for whatever is wrong with the options, as far as it shows without the model's weights."""
    check_limits(options)
    for mean in (options.mean, options.inner_mean):
        sweep_amounts(mean, options.step)
    given, source = (None, None) if options.vector_cut is None else read_vector(options.vector_cut)
    if given is not None:
        check_vector(given)
    _check_tasks(options)
    _check_together(options)

    from slicing.loading import load_config, load_tokenizer, resolve_device, resolve_dtype
    from slicing.tasks import check_fewshot, check_tokens, resolve_tasks

    resolve_device(options.cuda_device)
    resolve_dtype(options.dtype)
    _check_texts(options, measured=given is None)
    tasks = resolve_tasks(options.tasks, options.include_path) if options.tasks else None
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.model, dtype=options.dtype, **where)
    check_positions(config, "--perplexity-length", options.perplexity_length)
    vector, sizes = (given, ()) if options.swept == 0 else _check_slicing(options, config, given)
    if tasks is not None:
        check_fewshot(tasks, options.num_fewshot)

    tokenizer = load_tokenizer(options.model, **where)

    if tasks is not None:
        vocabulary = config.get_text_config(decoder=True).vocab_size
        which: dict[str, Any] = {"limit": options.accuracy_limit, "num_fewshot": options.num_fewshot}
        check_tokens(tasks, tokenizer, vocabulary, **which, seed=options.seed)
    windows = _read_windows(options, config, tokenizer, measured=vector is None)
    notes = tuple(_notes(options, given, vector, source))
    return Inputs(options, config, vector, source, tasks, **windows, notes=notes, inner_sizes=sizes)


def _check_tasks(options: Options) -> None:
    """InputError for a task that is not known, or options of tasks without any."""
    if options.tasks:
        from slicing.task_set import check_known

        check_known(options.tasks, options.include_path)
        return
    for flag in ("accuracy-limit", "num-fewshot", "include-path"):
        if getattr(options, flag.replace("-", "_")) is not None:
            raise InputError(f"--{flag} says how --tasks are measured: give --tasks too, or leave it out")


def _check_together(options: Options) -> None:
    """InputError for options that exclude one another."""
    if options.swept == 0:
        sliced = (
            ("find-base", False),
            ("compare", "none"),
            ("save-model", "none"),
            ("metric", "pca"),
            ("refit", False),
        )
        for flag, wanted in sliced:
            if getattr(options, flag.replace("-", "_")) != wanted:
                raise InputError(f"--{flag} needs a mean above 0, got --mean 0: nothing is sliced at 0")
    for flag, chosen in (("--refit", options.refit), ("--inner-mean", options.inner_mean > 0)):
        if chosen and options.calibration == "once":
            raise InputError(
                f"{flag} needs --calibration every-point: it is solved on the sliced stream, which one calibration of"
                " the dense model does not have"
            )
        if chosen and options.find_base:
            raise InputError(f"{flag} can't be searched with --find-base, which goes by one calibration: sweep instead")
    if options.speed and options.offload:
        raise InputError("--speed needs dense and sliced model on the GPU together: leave out --offload, or --speed")
    if options.save_model != "none" and not _in_utf8(options.output_dir):
        raise InputError(
            f"--output-dir is {options.output_dir!r}: safetensors writes below names in UTF-8 only; choose another"
        )
    if options.metric == "gradient" and options.mean == 0 and options.inner_mean > 0:
        raise InputError(
            "--metric gradient is of the bases of the hidden size, which --mean 0 leaves alone: leave it out"
        )


def _check_texts(options: Options, *, measured: bool) -> None:
    """InputError where a text or a split of it is not known. measured: LR is, on a text of its own."""
    from slicing.text import check_source

    check_source(options.dataset, options.perplexity_split, options.text_column)
    if options.swept > 0:
        check_source(options.dataset, "train", options.text_column)
        if measured:
            check_source(options.source_for_vector, REDUNDANCY_SPLIT, options.text_column)
        if options.find_base:
            check_source(options.dataset, "validation", options.text_column)


def _check_slicing(
    options: Options, config: "PretrainedConfig", vector: list[float] | None
) -> tuple[list[float] | None, tuple[int, ...]]:
    """InputError where the model can't be sliced as is wanted. LR (L) in [0, 1], and the inner width of each layer (L)
    where it is to be cut."""
    from slicing.check import check_config
    from slicing.refit import check_added

    family = find_family(config)
    check_config(config, family)
    check_positions(config, "--calibration-length", options.calibration_length)
    if options.refit or options.inner_mean > 0:
        check_added(family.blocks, config.model_type, "--refit" if options.refit else "--inner-mean")
    limit = _highest_cut(options, int(config.hidden_size))
    sizes = _inner_sizes(options, config, family) if options.inner_mean > 0 else ()
    if vector is not None:
        check_vector(vector, config.num_hidden_layers)
        vector = vector if (min(vector), max(vector)) == (0, 1) else normalise(vector)
        final_slices(vector, mean=options.mean, base=0.0, limit=limit)  # of all bases the one that can do least
        if sizes:
            inner_widths(vector, sizes, mean=options.inner_mean, base=0.0, multiple=options.round_interval)
    return vector, sizes


def _read_windows(
    options: Options, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", *, measured: bool
) -> dict[str, Windows]:
    """The windows that are needed, by their names in `Inputs`. measured: LR is."""
    from slicing.batches import check_token_ids
    from slicing.text import token_windows

    def windows(source: str, split: str, **which: Any) -> Windows:
        which |= {"split": split, "seed": options.seed, "text_column": options.text_column}
        ids = token_windows(source, tokenizer, **which)
        check_token_ids(ids, config.get_text_config(decoder=True).vocab_size)
        return Windows(source, split, ids)

    test = windows(options.dataset, options.perplexity_split, length=options.perplexity_length)
    found = {"test": test.first(options.perplexity_samples)}
    if options.swept == 0:
        return found
    drawn = {"length": options.calibration_length, "count": options.calibration_samples}
    found["calibration"] = windows(options.dataset, "train", **drawn)
    if options.find_base:
        validation = windows(options.dataset, "validation", length=options.perplexity_length)
        found["validation"] = validation.first(options.perplexity_samples)
    if measured:
        length = min(REDUNDANCY_LENGTH, positions_of(config) or REDUNDANCY_LENGTH)
        grid = {"length": length, "count": REDUNDANCY_WINDOWS, "stride": length}
        try:
            found["redundancy"] = windows(options.source_for_vector, REDUNDANCY_SPLIT, **grid)
        except InputError as error:
            raise InputError(f"can't measure LR: {error}; or give the --vector-cut of calculate_LR.py") from error
    return found


def _notes(
    options: Options, given: list[float] | None, vector: list[float] | None, source: "VectorFile | None"
) -> Iterator[str]:
    from slicing.text import is_file

    measured_on = None if source is None else (source.arguments or {}).get("model")
    if measured_on not in (None, options.model):
        yield f"the vector was measured on {measured_on!r}, the model is {options.model!r}"
    if given is not None and vector != given:
        yield f"the vector goes from {min(given):g} to {max(given):g}; normalised to [0, 1]"
    if options.swept > 0 and is_file(options.dataset) and "{split}" not in options.dataset:
        yield f"calibration and perplexity are on the same text: {options.dataset!r} has no '{{split}}' in it"
    elif options.swept > 0 and options.perplexity_split == "train":
        yield "calibration and perplexity are on the same text: --perplexity-split is train"


def _in_utf8(name: str) -> bool:
    try:
        return name.encode() is not None
    except UnicodeEncodeError:  # a byte of another coding
        return False


def _highest_cut(options: Options, hidden_size: int) -> float:
    """The largest part of D that a layer may lose; InputError where the mean or the interval goes beyond it."""
    interval = options.round_interval
    if interval > hidden_size:
        raise InputError(f"--round-interval is {interval}: it must be at most {hidden_size}, the model's hidden size")
    highest = 1 - interval / hidden_size
    if options.mean > highest:
        raise InputError(
            f"--mean is {options.mean:g}: it must be at most {rounded_down(highest)}, since each layer"
            f" keeps at least --round-interval {interval} of {hidden_size}"
        )
    return highest


def _inner_sizes(options: Options, config: "PretrainedConfig", family: "Family") -> tuple[int, ...]:
    """Inner width of each layer; InputError where the inner mean goes beyond what the interval leaves of them."""
    import torch
    from transformers import AutoModelForCausalLM

    from slicing.inner import inner_sizes

    with torch.device("meta"):
        sizes = tuple(inner_sizes(AutoModelForCausalLM.from_config(config), family))
    if not any(sizes):
        raise InputError("--inner-mean: no layer of the model has an MLP whose inner width could be cut")
    smallest = min(filter(None, sizes))
    if options.round_interval > smallest:
        raise InputError(
            f"--round-interval is {options.round_interval}: it must be at most {smallest}, the inner width"
        )
    highest = highest_inner_cut(sizes, options.round_interval)
    if options.inner_mean > highest:
        raise InputError(
            f"--inner-mean is {options.inner_mean:g}: it must be at most {rounded_down(highest)}, since each MLP keeps"
            f" at least --round-interval {options.round_interval} of {smallest} neurons"
        )
    return sizes
