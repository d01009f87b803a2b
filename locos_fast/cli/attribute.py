"""The command `locos-fast attribute`: which passages of a prompt the answer was written from, and by which heads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from locos_fast.cli.input import check_vocabulary, load_model, own_answer, own_answer_note, read_text
from locos_fast.cli.options import (
    Attention,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Overwrite,
    Revision,
    Trust,
    draw,
    errors,
    folder,
    say,
    show,
)


def attribute(
    model: Model,
    prompt: Annotated[Path, typer.Option(help="UTF-8 text file: everything before the answer, taken as it is.")],
    answer: Annotated[str, typer.Option(help="What the heads should write; fed after the prompt.")],
    segments: Annotated[
        str, typer.Option(help="sentences, paragraphs, N (blocks of N tokens), or token spans START:END,START:END,...")
    ] = "sentences",
    top: Annotated[int, typer.Option(min=1, help="Passages, and (head, passage) pairs, to print.")] = 20,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for array and picture.")] = Path(
        "attribution"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rank the passages of a prompt by what all heads wrote from them toward the answer, in one forward pass."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.prompts.compose import check_text
    from locos_fast.prompts.text_segments import parse_rule
    from locos_fast.report.attribution import save_picture
    from locos_fast.scoring.passages import ATTRIBUTION
    from locos_fast.scoring.result_folder import check_writable

    rule = parse_rule(segments)
    ATTRIBUTION.check(out, overwrite=overwrite)
    check_writable(out)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    text = read_text(prompt, "prompt", newline="")
    check_text("prompt", text)
    check_text("answer", answer)
    source.torch_dtype(source.config())  # a wrong model or dtype is said before a wrong prompt
    result = _attribution(source, text, answer, rule)
    result.meta["segments"] = segments
    if as_json:
        print(json.dumps(_as_dict(result, top), indent=2, allow_nan=False))
    else:
        _print(result, top)
    result.save_pretrained(out, overwrite=overwrite)  # after printing: nothing is lost if it fails
    draw(save_picture, result, out / ATTRIBUTION.picture)
    if not as_json:
        say(f"array and picture in {out}")


def _attribution(source: Any, text: str, answer: str, rule: Any) -> Any:
    """Tokenise, cut, load, attribute: a `PassageAttribution`."""
    import torch

    from locos_fast.models.description import describe_model
    from locos_fast.models.memory_estimate import Segments
    from locos_fast.prompts.compose import continuation, tokenise
    from locos_fast.prompts.text_segments import cover, cut, text_of
    from locos_fast.scoring.attribute_tokens import attribute_and_predict
    from locos_fast.scoring.passages import Passage, PassageAttribution

    tokenizer = source.tokenizer()
    tokens = tokenise(tokenizer, text)
    if not tokens.ids:
        raise ValueError("prompt: the tokenizer gives it no tokens")
    answer_ids = continuation(tokenizer, text, tokens.ids, answer)
    spans = cut(text, tokens.offsets, rule, leading=tokens.leading)
    prompt_length, length = len(tokens.ids), len(tokens.ids) + len(answer_ids)
    network, needed = load_model(source, length, "prompt", Segments(len(spans), len(answer_ids)))
    check_vocabulary(network, [*tokens.ids, *answer_ids])
    ids = torch.tensor([[*tokens.ids, *answer_ids]], device=network.get_input_embeddings().weight.device)
    positions = list(range(prompt_length, length))
    with errors.status(f"one forward pass over {length} tokens"):
        logits, predicted = attribute_and_predict(network, ids, positions, spans)
    names = tokenizer.convert_ids_to_tokens(tokens.ids)
    passages = [
        Passage(start, end, text_of(text, tokens.offsets, (start, end)) or "".join(names[start:end]))
        for start, end in spans
    ]
    meta = describe_model(network) | {
        "revision": source.revision,
        "protocol": "teacher-forced answer after the text of the prompt file",
        "norm": "none",
        "prompt_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "prompt_tokens": prompt_length,
        "answer": answer,
        "answer_ids": answer_ids,
        "answer_tokens": [tokenizer.decode([token]) for token in answer_ids],
        **own_answer(tokenizer, predicted, answer_ids),
        "answer_positions": positions,
        "cover": cover(spans, prompt_length)._asdict(),
        "memory_estimate_bytes": needed,
    }
    return PassageAttribution(logits, passages, meta)


def _as_dict(result: Any, top: int) -> dict[str, Any]:
    passages = []
    for rank, index in enumerate(result.top_passages(top), 1):
        layer, head = strongest = result.strongest_head(index)
        passages.append(
            {
                "rank": rank,
                "passage": index,
                "logits": float(result.totals[index]),
                "head": f"{layer}-{head}",
                "head_logits": float(result.logits[*strongest, index]),
                **result.passages[index]._asdict(),
            }
        )
    pairs = [
        {"head": f"{layer}-{head}", "passage": passage, "logits": logits, **result.passages[passage]._asdict()}
        for (layer, head), passage, logits in result.top_pairs(top)
    ]
    return {"passages": passages, "pairs": pairs, "meta": result.meta}


def _print(result: Any, top: int) -> None:
    from locos_fast.prompts.text_segments import Cover
    from locos_fast.report import attribution as attribution_report

    meta = result.meta
    show(attribution_report.passages_table(result, top), attribution_report.pairs_table(result, top))
    answer = zip(meta["answer_tokens"], meta["answer_ids"], strict=True)
    lines = [
        f"answer tokens: {', '.join(f'{token!r} ({i})' for token, i in answer)}",
        str(Cover(**meta["cover"])),
        f"tokens are the prompt's, special ones included; those of the answer ({len(meta['answer_ids'])}) "
        "follow them and lie in no segment",
        own_answer_note(meta),
    ]
    for line in filter(None, lines):
        say(line)
