"""The names of data sets, and what reads each of them."""

from __future__ import annotations

from pathlib import Path

from locos_fast.prompts.built_in_facts import BUILT_IN_FACTS
from locos_fast.prompts.datasets.dataset import Dataset
from locos_fast.prompts.datasets.niah import read_niah
from locos_fast.prompts.datasets.nolima import NEEDLE_SETS, read_nolima
from locos_fast.prompts.datasets.published import NIAH, NOLIMA
from locos_fast.prompts.fact_files import read_facts

PLANTED = "planted"  # the trials of a model, not a text's: the room of that name makes them
DATASET_NAMES = (*BUILT_IN_FACTS, NIAH.name, *NEEDLE_SETS, PLANTED)


def read_dataset(
    dataset: str, *, seed: int = 0, question_type: str | None = None, characters: int | None = None
) -> Dataset:
    """A data set by name: numbers, bridges, niah, nolima or nolima-hard, the last three with a colon and the folder if
    it is elsewhere than `locos-fast data get` puts it, or the path of a .jsonl file.

    seed: of everything drawn. question_type, characters: of NoLiMa, see `read_nolima`; onehop and 1.
    Raises ValueError, naming the argument, for a name that is none, an option that the data set does not have, and for
    whatever is wrong with its files.
    """
    name, colon, path = dataset.partition(":")
    for option, value in (("question-type", question_type), ("characters", characters)):
        if value is not None and name not in NEEDLE_SETS:
            raise ValueError(f"{option}: only {' and '.join(NEEDLE_SETS)} have them, not {dataset!r}")
    if colon and not path and name in DATASET_NAMES:
        raise ValueError(f"dataset: expected a folder behind the colon, got {dataset!r}")
    if name in BUILT_IN_FACTS and not colon:
        return Dataset(name, BUILT_IN_FACTS[name](seed))
    if name == NIAH.name:
        return read_niah(Path(path) if colon else NIAH.folder)
    if name in NEEDLE_SETS:
        folder = Path(path) if colon else NOLIMA.folder
        kind, count = "onehop" if question_type is None else question_type, 1 if characters is None else characters
        return read_nolima(folder, name=name, question_type=kind, characters=count, seed=seed)
    if name == PLANTED:
        raise ValueError("dataset: planted is made by locos_fast.planted.trials.planted_trials")
    if not Path(dataset).is_file():
        raise ValueError(f"dataset: expected {', '.join(DATASET_NAMES)} or a .jsonl file, got {dataset!r}")
    return Dataset(Path(dataset).stem, read_facts(Path(dataset)), curated=False)
