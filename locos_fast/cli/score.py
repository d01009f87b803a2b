"""The command `locos-fast score`: every head of a model, scored on one prompt of your own."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    Out,
    Overwrite,
    Revision,
    Trust,
    draw,
    errors,
    say,
    show,
    warn,
)
from locos_fast.scoring.head_scores import ARRAYS


def score(
    model: Model,
    context: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    needle: Annotated[str, typer.Option(help="The sentence that holds the evidence.")],
    question: Annotated[str, typer.Option(help="Asked after the context.")],
    answer: Annotated[str, typer.Option(help="What the heads should write; scored teacher-forced.")],
    depth: Annotated[
        float | None, typer.Option(help="Insert the needle at this percent of the context, 0 to 100.")
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            help="Ask as a chat, thinking off, as `scan` does where the tokenizer has a template. Without, the prompt "
            "is context, blank line and question as they stand."
        ),
    ] = False,
    lead: Annotated[
        str, typer.Option(metavar="TEXT", help="Begin the reply with this; the answer has to follow it.")
    ] = "",
    norm: Annotated[str, typer.Option(help="none, the published score, or frozen, true logit units.")] = "none",
    top: Annotated[int, typer.Option(min=1, help="Heads to print.")] = 10,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    verify: Annotated[bool, typer.Option(help="Check the recording against the head outputs.")] = False,
    timing: Annotated[bool, typer.Option(help="Also print seconds and, on a GPU, peak memory.")] = False,
    force: Annotated[bool, typer.Option(help="Keep scores whose parts do not add up to the model's logit.")] = False,
    trust_remote_code: Trust = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score every head of a model on one prompt of your own."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.prompts.compose import compose
    from locos_fast.report import tables as report
    from locos_fast.report.pictures import save_heat_map
    from locos_fast.scoring.diagnosis import diagnose
    from locos_fast.scoring.directions import check_norm
    from locos_fast.scoring.head_scores import SCORES
    from locos_fast.scoring.result_folder import check_writable
    from locos_fast.scoring.score import score_tokens

    unit = check_norm(norm)
    if out is not None:
        SCORES.check(out, overwrite=overwrite)
        check_writable(out)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    text = read_text(context, "context")
    source.torch_dtype(source.config())  # a wrong model or dtype is said before a wrong prompt
    tokenizer = source.tokenizer()
    trial = compose(
        tokenizer,
        context=text,
        needle=needle,
        question=question,
        answer=answer,
        depth=depth,
        chat_template=chat_template,
        lead=lead,
    )
    network, needed = load_model(source, trial.length + len(trial.answer_ids), "context")
    check_vocabulary(network, [*trial.prompt_ids, *trial.answer_ids])
    ids = trial.input_ids.to(network.get_input_embeddings().weight.device)
    with errors.status(f"one forward pass over {ids.shape[1]} tokens"):
        completeness = diagnose(network).completeness if norm == "none" else None  # frozen scores bring their own
        scores = score_tokens(network, ids, trial.needle_span, trial.answer_positions, norm=unit, verify=verify)
    scores.meta |= {
        "protocol": f"teacher-forced answer after {_prompt_parts(chat_template, lead)}",
        "chat_template": chat_template,
        "lead": lead,
        "span": "needle tokens against all other keys the answer row sees",
        "completeness": completeness or scores.meta["completeness"],
        "revision": revision,
        "verified": verify,
        "answer_tokens": [tokenizer.decode([token]) for token in trial.answer_ids],
        **own_answer(tokenizer, scores.meta["predicted_ids"], trial.answer_ids),
        "needle_tokens": [tokenizer.decode([token]) for token in trial.prompt_ids[slice(*trial.needle_span)]],
        **trial.describe(),
        "memory_estimate_bytes": needed,
    }
    _judge(scores.meta, network.dtype, force)
    _print_scores(scores, top, as_json)
    if not (as_json or chat_template or scores.meta["answer_is_predicted"]) and getattr(
        tokenizer, "chat_template", None
    ):
        say("note: this tokenizer has a chat template; --chat-template asks in it, --lead begins the reply")
    if timing and not as_json:  # JSON has it in any case
        say(report.cost_line(scores.meta["cost"]))
    if out is not None:  # after printing: nothing is lost if it fails
        scores.save_pretrained(out, overwrite=overwrite)
        draw(save_heat_map, scores, out / SCORES.picture, title=f"LOCOS score, {scores.meta['model']}")


def _prompt_parts(chat_template: bool, lead: str) -> str:
    parts = "context, blank line, question"
    if chat_template:
        parts = f"a chat template, thinking off, around {parts}"
    return f"{parts}, and a reply begun with a lead" if lead else parts


def _judge(meta: dict[str, Any], dtype: Any, force: bool) -> None:
    """Warn if the parts do not add up to the model's logit; raise ValueError if scores are far from the logits they
    claim to be."""
    from locos_fast.scoring.diagnosis import doubt, verdict_of

    sentence = doubt(meta["completeness"], dtype)
    if sentence is None:
        return
    if meta["norm"] == "none":
        warn(f'true logit units (norm="frozen") cannot be had exactly from this model: {sentence}')
    elif verdict_of(meta["completeness"], dtype) == "wrong" and not force:
        raise ValueError(
            f"completeness: {sentence}; the scores are not logits. --force keeps them, --norm none does not need it"
        )
    else:
        warn(sentence)


def _print_scores(scores: Any, top: int, as_json: bool) -> None:
    from locos_fast.report import tables as report

    if as_json:
        heads = [
            {"head": f"{layer}-{head}"} | {name: float(getattr(scores, name)[layer, head]) for name in ARRAYS}
            for layer, head in scores.top(top)
        ]
        print(json.dumps({"heads": heads, "meta": scores.meta}, indent=2, allow_nan=False))
        return
    show(report.scores_table(scores, top))
    tokens = ", ".join(f"{token!r} ({i})" for token, i in _answer_tokens(scores))
    say(f"scored answer tokens: {tokens}")
    for start, end in scores.meta["needle_spans"]:
        needle = " ".join(map(repr, scores.meta["needle_tokens"]))
        say(f"needle: tokens {start} to {end - 1} of {scores.meta['tokens']}: {needle}")
    if scores.meta["verified"]:
        say("verified: the recording reproduces the outputs of the heads")
    if note := own_answer_note(scores.meta):
        say(note)


def _answer_tokens(scores: Any) -> Iterable[tuple[str, int]]:
    return zip(scores.meta["answer_tokens"], scores.meta["answer_ids"], strict=True)
