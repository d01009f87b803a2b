"""Data sets of scans: what is hidden, where, and how it is asked for.

A data set is read by its name into one kind of object, whatever its source: `read_dataset("nolima:FOLDER")`.
"""

from locos_fast.prompts.datasets.dataset import Dataset
from locos_fast.prompts.datasets.registry import DATASET_NAMES, read_dataset

__all__ = ["DATASET_NAMES", "Dataset", "read_dataset"]
