"""The command `locos-fast doctor`: what can be scored on a model, layer by layer, and how exactly."""

from __future__ import annotations

import json

from locos_fast.cli.input import load_model
from locos_fast.cli.options import Attention, Device, DeviceMap, Dtype, Json, Model, Revision, Trust, say, show


def doctor(
    model: Model,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what can be scored on a model, layer by layer, and how exactly: one short forward pass, no tokenizer."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.report import tables as report
    from locos_fast.scoring import diagnosis

    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    network, _ = load_model(source, diagnosis.prompt_tokens(source.config()), "model")
    result = diagnosis.diagnose(network)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, allow_nan=False))
        return
    show(report.diagnosis_table(result))
    for line in report.diagnosis_summary(result):
        say(line)
