"""The table of detectors in README.md, from their registry: `python -m tests.detector_table` prints it."""

from locos_fast.scoring.detectors import CRI, CRI_FORMULA, CRI_SOURCE, DETECTORS, LABELS

NEEDS = {
    "prompt": "",
    "question": "the question's tokens",
    "foil": "a foil",
    "frozen": "a logit that can be followed",
    "lens": "`--tuned-lens`",
}


def table() -> str:
    """Markdown, a line for each detector."""
    rows = [(d.name, d.label, d.formula, ", ".join(NEEDS[n] for n in d.needs if NEEDS[n]), d.source) for d in DETECTORS]
    rows.append((CRI, LABELS[CRI], CRI_FORMULA, "`--cri`", CRI_SOURCE))
    lines = [f"| `{name}` | {label} | {formula} | {needs} | {source} |" for name, label, formula, needs, source in rows]
    return "\n".join(["| array | detector | formula | needs | source |", "|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(table())
