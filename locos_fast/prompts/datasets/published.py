"""Data sets of others, no part of this project: where they are published, and where they are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import platformdirs


class Published(NamedTuple):
    """A data set that its authors publish.

    hub_id   dataset repository on the Hugging Face hub; none if it is not there
    files    what of the repository is needed, as patterns
    source   where to get it by hand
    holds    what the folder has to hold, in words
    licence  what the authors say about its use
    """

    name: str
    hub_id: str | None
    files: tuple[str, ...]
    source: str
    holds: str
    licence: str

    @property
    def folder(self) -> Path:
        """Where it is looked for if no folder is given: in the user's cache folder."""
        return platformdirs.user_cache_path("locos_fast") / "datasets" / self.name

    def by_hand(self, folder: Path) -> str:
        return f"by hand: from {self.source} put {self.holds} into {folder}"

    def missing(self, folder: Path, what: str) -> ValueError:
        """The error for something that the folder lacks, with the way to get it."""
        command = f"`locos-fast data get {self.name} --out {folder}` gets it"
        return ValueError(
            f"dataset: {self.name}: {folder} has no {what}; {command if self.hub_id else self.by_hand(folder)}"
        )


NIAH = Published(
    name="niah",
    hub_id=None,
    files=(),
    source="https://github.com/nightdessert/Retrieval_Head, folder haystack_for_detect,",
    holds="needles.jsonl and, for every needle, part1/p1.txt, part2/p1.txt, ...",
    licence="its repository has no licence file: ask its authors before you pass anything on",
)
NOLIMA = Published(
    name="nolima",
    hub_id="amodaresi/NoLiMa",
    files=("needlesets/needle_set.json", "needlesets/needle_set_hard.json", "haystack/rand_shuffle/*.txt", "LICENSE*"),
    source="https://huggingface.co/datasets/amodaresi/NoLiMa",
    holds="needlesets/needle_set.json, needlesets/needle_set_hard.json and haystack/rand_shuffle/rand_book_*.txt",
    licence="Adobe Research licence: non-commercial research only",
)
PUBLISHED = {data.name: data for data in (NIAH, NOLIMA)}
