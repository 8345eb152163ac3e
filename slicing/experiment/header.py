"""What results.json says of a run besides its points."""

from dataclasses import asdict

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slicing.experiment import identity
from slicing.experiment.inputs import Inputs
from slicing.experiment.keys import Keys
from slicing.experiment.results import SCHEMA_VERSION, Data, Model, Results, Task
from slicing.modeling import count_parameters, dense_config


def header(inputs: Inputs, model: PreTrainedModel, device: torch.device, keys: Keys) -> Results:
    """Results without points, and without LR and search, which are found later."""
    options = inputs.options
    return Results(
        schema_version=SCHEMA_VERSION,
        arguments=asdict(options),
        model=_model(inputs, model),
        versions=identity.versions(options),
        git=identity.git_commit(),
        device=identity.device_name(device),
        seed=options.seed,
        data=Data(
            perplexity=inputs.test.entry(),
            calibration=None if inputs.calibration is None else inputs.calibration.entry(),
            redundancy=None,
        ),
        redundancy=None,
        search=None,
        tasks=_tasks(inputs, keys),
        points=[],
    )


def _model(inputs: Inputs, model: PreTrainedModel) -> Model:
    head, config = model.get_output_embeddings(), inputs.config
    return Model(
        name=inputs.options.model,
        revision=identity.model_commit(inputs.options),
        model_type=config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=_dense_parameters(model),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        hidden_size=config.get_text_config().hidden_size,
        layers=config.get_text_config().num_hidden_layers,
    )


def _dense_parameters(model: PreTrainedModel) -> int:
    """Unique parameters of the dense model: of one that was sliced before, by the config it was made of."""
    dense = dense_config(model.config)
    if dense is model.config:
        return count_parameters(model)
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(dense))


def _tasks(inputs: Inputs, keys: Keys) -> dict[str, Task]:
    """The tasks that are reported."""
    if inputs.tasks is None or keys.scores is None:
        return {}
    loaded, content = inputs.tasks.loaded, keys.scores["tasks"]
    return {
        name: Task(loaded.version(name), content[name], loaded.shots(name, inputs.options.num_fewshot))
        for name in loaded.reported
    }
