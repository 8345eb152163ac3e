"""LR of a run: as it was given, or measured once and kept."""

from msgspec.structs import replace

from slicing.experiment.inputs import Inputs
from slicing.experiment.keys import Keys
from slicing.experiment.measure import Measurement
from slicing.experiment.ranks import Ranks
from slicing.experiment.results import VectorFile
from slicing.experiment.run_folder import RunFolder


def find_vector(
    inputs: Inputs, ranks: Ranks, folder: RunFolder, keys: Keys, measurement: Measurement
) -> VectorFile | None:
    """LR (L) with what is known of it, in every rank; None where nothing is sliced."""
    if inputs.options.swept == 0:
        return None
    if inputs.vector is not None:
        return replace(inputs.source or VectorFile(inputs.vector), normalised=inputs.vector)
    return ranks.from_first(_measured(inputs, folder, keys, measurement) if ranks.first else None)


def _measured(inputs: Inputs, folder: RunFolder, keys: Keys, measurement: Measurement) -> VectorFile:
    """On a GPU another time might give other last digits, and so other points."""
    assert inputs.redundancy is not None
    key = keys.redundancy(inputs.redundancy)
    found = folder.take_over(VectorFile, key)
    if found is None:
        found = measurement.redundancy(inputs.redundancy)
        folder.write(VectorFile, key, found)
    return found
