"""The options of an experiment: each flag of mean_cut_accuracy_experiments.py once."""

from dataclasses import dataclass

from slicing.flags import flag


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
    speed: bool = flag(
        False,
        help="also measure tokens a second and peak memory of each point beside the dense model's, by turns; a sliced"
        " model is timed by its widths, with random weights, so finished points are not sliced again",
    )
    save_model: str = flag("none", help="sliced models to keep in the run's folder", choices=("none", "best", "all"))
    output_dir: str = flag("results", help="where the run's folder goes", metavar="FOLDER", is_path=True)
    fresh: bool = flag(False, help="start over: forget the run's points and models, and take none over from other runs")
    quiet: bool = flag(False, help="show no progress bars")

    @property
    def swept(self) -> float:
        """SP of the sweep: of the hidden size, or of the inner width where that alone is cut; 0: nothing is sliced."""
        return self.mean or self.inner_mean
