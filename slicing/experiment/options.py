"""The options of an experiment, and the checks that need no weights: what is wrong is said before they are loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slicing.families import InputError, find_family
from slicing.files import local_path, read_json
from slicing.flags import check_limits, flag
from slicing.schedule import (
    check_vector,
    difference,
    final_slices,
    highest_inner_cut,
    inner_widths,
    normalise,
    rounded_down,
    slice_widths,
    sweep_amounts,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from slicing.experiment.results import Kind, VectorFile
    from slicing.families import Family
    from slicing.task_set import TaskSet

REDUNDANCY_WINDOWS, REDUNDANCY_LENGTH, REDUNDANCY_SPLIT = 128, 1024, "validation"  # where no vector is given


@dataclass(frozen=True)
class Options:
    """The options of mean_cut_accuracy_experiments.py, a field a flag; written as they are into results.json."""

    model: str = flag(help="hub name, local folder, .gguf file, or demo; with --mean 0 also a sliced model's folder")
    mean: float = flag(
        help="SP, the mean cut of the hidden size over the layers, in [0, 1); 0 leaves it alone: evaluate only, or cut"
        " by --inner-mean",
        enters="run",
    )
    inner_mean: float = flag(
        0.0,
        help="mean cut of the MLPs' inner width over the layers, in [0, 1), with the same SB / SP",
        enters="run",
        added=True,
    )
    vector_cut: tuple[str, ...] | None = flag(
        None,
        help="LR of each layer, or the .json file that calculate_LR.py --output wrote",
        default="measured on --source-for-vector",
        metavar="LR",
    )
    source_for_vector: str = flag(
        "wikitext2", help="text that LR is measured on (its validation split) if no vector is given", for_demo="demo"
    )
    dataset: str = flag(
        "wikitext2",
        help="text for calibration (its train split) and perplexity: wikitext2, ptb, c4, alpaca, pg19, demo, or a .txt,"
        " .jsonl or .parquet file, with '{split}' in its name for the split",
        for_demo="demo",
    )
    text_column: str | None = flag(None, help="field of a .jsonl or .parquet file that holds the text", default="text")
    cuda_device: str = flag(
        "auto",
        help="auto, cpu, mps, cuda or cuda:N; a model that doesn't fit there is spread over all GPUs and the CPU",
        default="auto, the best there is",
    )
    dtype: str = flag("auto", help="auto, float32, bfloat16, float16 or float64", default="auto, the checkpoint's own")
    revision: str | None = flag(None, help="branch, tag or commit of a model on the hub", default="main")
    trust_remote_code: bool = flag(False, help="run model code from the hub")
    step: float = flag(0.02, help="distance between the amounts SP - SB of the sweep", enters="run")
    round_interval: int = flag(
        8, help="widths are multiples of this; 1 gives the paper's exact widths, which run slowly", low=1, enters="run"
    )
    rotations: int = flag(
        2, help="bases per layer: 2, as in the paper, or 1, which is smaller", choices=(1, 2), enters="run"
    )
    metric: str = flag(
        "pca",
        help="what the bases keep: pca, the most variance, or gradient, what the loss depends on most",
        choices=("pca", "gradient"),
        enters="run",
        added=True,
    )
    refit: bool = flag(
        False,
        help="solve the layers' writers anew by least squares, so that the sliced stream follows the dense one",
        enters="run",
        added=True,
    )
    calibration: str = flag(
        "every-point",
        help="once: take all points from one calibration of the dense model, which is faster and less exact",
        choices=("every-point", "once"),
        enters="run",
    )
    calibration_samples: int = flag(128, help="random windows to calibrate on", low=1, enters="run")
    calibration_length: int = flag(2048, help="tokens per calibration window", low=1, enters="run")
    perplexity_split: str = flag("test", help="split of the data set for perplexity")
    perplexity_length: int = flag(2048, help="tokens per perplexity window", low=2, enters="run")
    perplexity_samples: int | None = flag(
        None, help="number of windows for perplexity, from the first on", default="all", low=1, enters="run"
    )
    tasks: tuple[str, ...] = flag(
        (), help="lm-eval tasks", default="none, perplexity only", metavar="TASK", enters="point"
    )
    accuracy_limit: int | None = flag(
        None, help="number of documents of each task, from the first on", default="all", low=1, enters="point"
    )
    include_path: str | None = flag(
        None, help="folder with lm-eval task files", default="lm-eval's own tasks", metavar="FOLDER", is_path=True
    )
    num_fewshot: int | None = flag(
        None, help="examples in the prompt", default="each task's own number", low=0, enters="point"
    )
    compare: str = flag(
        "none",
        help="equal-parameters: add the constant slicing that is as large as the best dynamic point",
        choices=("none", "equal-parameters"),
    )
    find_base: bool = flag(
        False, help="search for the best SB on the validation split instead of sweeping", enters="run"
    )
    offload: bool = flag(
        False,
        help="keep the weights on the CPU and copy one layer at a time to the GPU; automatic for a model that"
        " doesn't fit",
    )
    batch_size: int | None = flag(
        None,
        help="windows, and requests of tasks, that run at once",
        default="what the device holds",
        low=1,
        enters="point",
    )
    seed: int = flag(
        42, help="for the choice of calibration windows and few-shot examples", low=0, high=2**32 - 1, enters="point"
    )
    seeds: tuple[int, ...] = flag(
        (),
        help="in place of --seed: a run for each, and a table of the means with the standard deviation over the seeds",
        default="one run, with --seed",
        low=0,
        high=2**32 - 1,
        metavar="SEED",
    )
    save_model: str = flag("none", help="sliced models to keep in the run's folder", choices=("none", "best", "all"))
    output_dir: str = flag("results", help="where the run's folder goes", metavar="FOLDER", is_path=True)
    fresh: bool = flag(False, help="start over: forget the run's points and models, and take none over from other runs")
    quiet: bool = flag(False, help="show no progress bars")

    @property
    def swept(self) -> float:
        """SP of the sweep: of the hidden size, or of the inner width where that alone is cut; 0: nothing is sliced."""
        return self.mean or self.inner_mean


@dataclass(frozen=True)
class Target:
    """A point to be measured: `base` None is the dense model, else SB, with FS and widths (L); SP, SB and widths (L) of
    the MLPs' neurons where these are cut. Where they alone are, `mean` and `base` are theirs too."""

    kind: "Kind | Literal['search']"
    mean: float | None = None
    base: float | None = None
    slices: list[float] | None = None
    widths: list[int] | None = None
    calibration: str | None = None
    inner_mean: float | None = None
    inner_base: float | None = None
    inner_widths: list[int] | None = None

    @property
    def amount(self) -> float | None:
        """SP - SB; None for the dense model."""
        return None if self.mean is None or self.base is None else difference(self.mean, self.base)


@dataclass(frozen=True)
class Checked:
    """Options found good, with what the checks had to read.

    vector: LR (L), None where it is to be measured; source: the file that it came from.
    test_windows, calibration_windows, validation_windows, redundancy_windows: token ids (N, S) each, of what
        perplexity, slicing, --find-base and a vector that is not given are measured on; None where there is no need.
    notes: what a user should know before the run.
    inner_sizes: inner width of each layer (L), where it is to be cut.
    """

    options: Options
    config: "PretrainedConfig"
    vector: list[float] | None
    source: "VectorFile | None"
    tasks: "TaskSet | None"
    test_windows: "torch.Tensor"
    calibration_windows: "torch.Tensor | None" = None
    validation_windows: "torch.Tensor | None" = None
    redundancy_windows: "torch.Tensor | None" = None
    notes: tuple[str, ...] = ()
    inner_sizes: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    def target(
        self,
        mean: float,
        base: float,
        vector: list[float],
        *,
        kind: "Kind | Literal['search']" = "sweep",
        calibration: str | None = None,
    ) -> Target:
        """The point with these SP and SB of the sweep; what else is cut has its own SP in proportion, and SB / SP."""
        options, multiple = self.options, self.options.round_interval
        calibration = calibration or options.calibration
        stream, inner = (mean, base), (mean, base)
        if options.mean:
            part = options.inner_mean / options.mean
            inner = mean * part, base * part
            if mean == options.mean:  # as it was given, to the last digit
                inner = options.inner_mean, options.inner_mean * (base / mean)
        else:
            stream = 0.0, 0.0
        slices = final_slices(vector, mean=stream[0], base=stream[1], limit=1 - multiple / self.hidden_size)
        widths = slice_widths(slices, self.hidden_size, multiple=multiple)
        if not options.inner_mean:
            return Target(kind, mean, base, slices, widths, calibration)
        alike = not options.mean and base == mean and kind != "equal-parameters"  # a plain checkpoint is possible
        neurons = inner_widths(vector, self.inner_sizes, mean=inner[0], base=inner[1], multiple=multiple, alike=alike)
        return Target(kind, mean, base, slices, widths, calibration, *inner, neurons)

    def highest_mean(self) -> float:
        """The largest SP of the sweep that all that is cut with it allows."""
        options, multiple = self.options, self.options.round_interval
        limits = []
        if options.mean:
            limits.append(1 - multiple / self.hidden_size)
        if options.inner_mean:
            part = options.inner_mean / options.swept
            limits.append(highest_inner_cut(self.inner_sizes, multiple) / part)
        return min(limits)

    def targets(self, vector: list[float] | None) -> list[Target]:
        """The dense model, constant slicing, and the further amounts up to the mean."""
        mean = self.options.swept
        if mean == 0 or vector is None:
            return [Target("dense")]
        amounts = sweep_amounts(mean, self.options.step)
        return [Target("dense"), *(self.target(mean, difference(mean, amount), vector) for amount in amounts)]


def check(options: Options) -> Checked:
    """Raise InputError for whatever is wrong with the options, as far as it shows without the model's weights."""
    check_limits(options)
    for mean in (options.mean, options.inner_mean):
        sweep_amounts(mean, options.step)
    vector, source = (None, None) if options.vector_cut is None else read_vector(options.vector_cut)
    if vector is not None:
        check_vector(vector)
    if not options.tasks:
        for flag in ("accuracy-limit", "num-fewshot", "include-path"):
            if getattr(options, flag.replace("-", "_")) is not None:
                raise InputError(f"--{flag} says how --tasks are measured: give --tasks too, or leave it out")
    else:
        from slicing.task_set import check_known

        check_known(options.tasks, options.include_path)
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
    if options.save_model != "none" and not _in_utf8(options.output_dir):
        raise InputError(
            f"--output-dir is {options.output_dir!r}: safetensors writes below names in UTF-8 only; choose another"
        )
    if options.metric == "gradient" and options.mean == 0 and options.inner_mean > 0:
        raise InputError(
            "--metric gradient is of the bases of the hidden size, which --mean 0 leaves alone: leave it out"
        )

    from slicing.batches import check_token_ids
    from slicing.check import check_config
    from slicing.loading import load_config, load_tokenizer, resolve_device, resolve_dtype
    from slicing.refit import check_added
    from slicing.tasks import check_fewshot, check_tokens, resolve_tasks
    from slicing.text import check_source, is_file, token_windows

    resolve_device(options.cuda_device)
    resolve_dtype(options.dtype)
    check_source(options.dataset, options.perplexity_split, options.text_column)
    if options.swept > 0:
        check_source(options.dataset, "train", options.text_column)
        if vector is None:
            check_source(options.source_for_vector, REDUNDANCY_SPLIT, options.text_column)
        if options.find_base:
            check_source(options.dataset, "validation", options.text_column)
    tasks = resolve_tasks(options.tasks, options.include_path) if options.tasks else None
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.model, dtype=options.dtype, **where)
    check_positions(config, "--perplexity-length", options.perplexity_length)
    given = vector
    sizes: tuple[int, ...] = ()
    if options.swept > 0:
        family = find_family(config)
        check_config(config, family)
        check_positions(config, "--calibration-length", options.calibration_length)
        if options.refit or options.inner_mean > 0:
            check_added(family.blocks, config.model_type, "--refit" if options.refit else "--inner-mean")
        limit = _highest_cut(options, int(config.hidden_size))
        if options.inner_mean > 0:
            sizes = _inner_sizes(options, config, family)
        if vector is not None:
            check_vector(vector, config.num_hidden_layers)
            vector = vector if (min(vector), max(vector)) == (0, 1) else normalise(vector)
            final_slices(vector, mean=options.mean, base=0.0, limit=limit)  # of all bases the one that can do least
            if sizes:
                inner_widths(vector, sizes, mean=options.inner_mean, base=0.0, multiple=options.round_interval)
    if tasks is not None:
        check_fewshot(tasks, options.num_fewshot)

    tokenizer = load_tokenizer(options.model, **where)

    vocabulary = config.get_text_config(decoder=True).vocab_size
    if tasks is not None:
        check_tokens(
            tasks,
            tokenizer,
            vocabulary,
            limit=options.accuracy_limit,
            num_fewshot=options.num_fewshot,
            seed=options.seed,
        )

    def windows(source: str, split: str, **which: Any) -> "torch.Tensor":
        which |= {"split": split, "seed": options.seed, "text_column": options.text_column}
        found = token_windows(source, tokenizer, **which)
        check_token_ids(found, vocabulary)
        return found

    test = windows(options.dataset, options.perplexity_split, length=options.perplexity_length)
    calibration = validation = redundancy = None
    if options.swept > 0:
        calibration = windows(
            options.dataset, "train", length=options.calibration_length, count=options.calibration_samples
        )
        if options.find_base:
            validation = windows(options.dataset, "validation", length=options.perplexity_length)
            validation = validation[: options.perplexity_samples]
        if vector is None:
            length = min(REDUNDANCY_LENGTH, positions_of(config) or REDUNDANCY_LENGTH)
            grid = {"length": length, "count": REDUNDANCY_WINDOWS, "stride": length}
            try:
                redundancy = windows(options.source_for_vector, REDUNDANCY_SPLIT, **grid)
            except InputError as error:
                raise InputError(f"can't measure LR: {error}; or give the --vector-cut of calculate_LR.py") from error
    notes = []
    measured_on = None if source is None else (source.arguments or {}).get("model")
    if measured_on not in (None, options.model):
        notes.append(f"the vector was measured on {measured_on!r}, the model is {options.model!r}")
    if given is not None and vector != given:
        notes.append(f"the vector goes from {min(given):g} to {max(given):g}; normalised to [0, 1]")
    if options.swept > 0 and is_file(options.dataset) and "{split}" not in options.dataset:
        notes.append(f"calibration and perplexity are on the same text: {options.dataset!r} has no '{{split}}' in it")
    elif options.swept > 0 and options.perplexity_split == "train":
        notes.append("calibration and perplexity are on the same text: --perplexity-split is train")
    test = test[: options.perplexity_samples]
    windows_of = (test, calibration, validation, redundancy)
    return Checked(options, config, vector, source, tasks, *windows_of, tuple(notes), sizes)


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


def positions_of(config: "PretrainedConfig") -> int | None:
    """How many tokens a model was made for, where its config says so."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def check_positions(config: "PretrainedConfig", flag: str, length: int) -> None:
    """InputError where windows are longer than the positions that a model was made for."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise InputError(f"{flag} is {length}, the model has {positions} positions: choose {positions} or less")


def read_vector(given: tuple[str, ...]) -> "tuple[list[float], VectorFile | None]":
    """LR from the command line: a number a layer, or one JSON file that calculate_LR.py --output wrote; and what such a
    file says of it."""
    if len(given) == 1 and given[0].lower().endswith(".json"):
        from slicing.experiment.results import VectorFile
        from slicing.structure import from_json

        try:
            source = from_json(read_json(local_path(given[0])), VectorFile)
            source.check_lengths()
        except InputError as error:
            raise InputError(f"--vector-cut {given[0]!r}: {error}: give the file that --output wrote") from error
        return source.normalised, source
    try:
        return [float(value) for value in " ".join(given).split()], None  # also of a quoted line
    except ValueError as error:
        raise InputError(f"--vector-cut takes numbers or one .json file: {error}") from error
