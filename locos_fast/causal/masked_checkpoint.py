"""mask_checkpoint(): a model folder in which some heads write nothing, for whatever runs Hugging Face checkpoints.

The columns of the output projections that read these heads are zeroed in the files, which comes to the same as
`ablate(mode="output-zero")` while a model runs; biases belong to no head and stay. Nothing else changes: the weights
are never loaded, every other byte is copied or hard-linked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locos_fast._version import __version__
from locos_fast.causal.model_shape import check_heads
from locos_fast.models.architecture import AttentionLayer, attention_layers, decoder_layers, head_count
from locos_fast.models.built_in import SIZES_FILE
from locos_fast.models.foreign_errors import one_value_error
from locos_fast.models.loading import ModelSource
from locos_fast.models.safetensors_files import FLOAT_BYTES, StoredTensor, Weights, zero_slices
from locos_fast.models.weightless import weightless
from locos_fast.scoring.head_scores import Head
from locos_fast.scoring.result_folder import check_writable

PROVENANCE = "masked_heads.json"
ALONGSIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # configuration, tokenizer, templates, code
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
TEMPLATES = "additional_chat_templates"
NOT_DOWNLOADED = ("*/*.safetensors", "consolidated*.safetensors")  # the same weights in another layout
DOWNLOADED = ("*.safetensors", *(f"*{suffix}" for suffix in ALONGSIDE), *(f"{name}*" for name in LICENCES))


class MaskedCheckpoint(NamedTuple):
    """What `mask_checkpoint` wrote."""

    folder: Path
    heads: list[Head]  # in order
    parameters: list[str]  # names in the files, of the weights with zeroed columns
    rewritten: list[str]  # weight files that differ from the source's
    unchanged: list[str]  # weight files that are the source's: hard links, or copies where links are impossible


class MaskedWeight(NamedTuple):
    """One output projection, and which of its input features are to be zero."""

    tensor: StoredTensor
    features: list[slice]
    axis: int  # of the input features: 1 in Linear's weights, 0 in Conv1D's


def mask_checkpoint(
    source: str | os.PathLike | ModelSource,
    heads: Iterable[Head],
    out: str | os.PathLike,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> MaskedCheckpoint:
    """Write into the folder `out` the checkpoint of `source` with the output of `heads`, [(layer, head)], zeroed.

    source: a model folder, a hub id, or the name of a built-in model. `out` is complete or not there; it also holds
    `masked_heads.json`, which says what was done to what. overwrite: replace a masked checkpoint that `out` holds.
    revision, trust_remote_code: as `load` has them, of a source that is no `ModelSource`.
    Raises ValueError for heads that the model does not have, and for checkpoints that cannot be masked in their files:
    packed (quantised) projections, projections that several layers share, adapters, weights in pickles; FileExistsError
    for a folder that holds anything else, or a masked checkpoint without `overwrite`.
    """
    if not isinstance(source, ModelSource):
        source = ModelSource(os.fspath(source), revision, trust_remote_code=trust_remote_code)
    target = Path(out)
    _check_target(target, overwrite=overwrite)
    config = source.config()
    model = weightless(config)
    chosen = sorted(check_heads(model, heads))
    folder = _source_folder(source)
    if target.exists() and target.resolve() == folder.resolve():
        raise FileExistsError(f"{target} is the checkpoint to be masked; choose another folder")
    weights = Weights.of(folder, source.model)
    masked = _masked_weights(model, chosen, weights, _packing(config))
    check_writable(target)
    with _written_whole(target) as scratch:
        _copy_alongside(folder, scratch)
        done = _write_weights(weights, masked, scratch)
        checkpoint = MaskedCheckpoint(target, chosen, [weight.tensor.name for weight in masked], *done)
        provenance = _provenance(source, folder, scratch, checkpoint)
        (scratch / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder")
    if (target / PROVENANCE).is_file():
        if not overwrite:
            raise FileExistsError(f"{target} already holds a masked checkpoint; choose another folder or overwrite it")
    elif target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds files that are no masked checkpoint's; choose another folder")


def _source_folder(source: ModelSource) -> Path:
    """The folder with the checkpoint's files; those of a hub id are downloaded first."""
    place = Path(source.place)
    if not place.is_dir():
        import huggingface_hub

        with one_value_error(f"model: cannot download {source.model!r}"):
            download = huggingface_hub.snapshot_download(
                source.place,
                revision=source.revision,
                allow_patterns=list(DOWNLOADED),
                ignore_patterns=list(NOT_DOWNLOADED),
            )
        place = Path(download)
    if (place / "adapter_config.json").is_file():
        raise ValueError(
            f"model: {source.model!r} holds an adapter, which adds to the projections whatever its base has there; "
            "merge it into its base first"
        )
    return place


def _packing(config: Any) -> str | None:
    """How the configuration says that the checkpoint is quantised."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    return str(declared.get("quant_method") if isinstance(declared, dict) else declared.quant_method)


def _masked_weights(
    model: PreTrainedModel, heads: Sequence[Head], weights: Weights, packing: str | None
) -> list[MaskedWeight]:
    of_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        of_layer[layer].append(head)
    layers = {layer.number: layer for layer in attention_layers(model)}
    return [_masked_weight(model, layers[number], of_layer[number], weights, packing) for number in of_layer]


def _masked_weight(
    model: PreTrainedModel, layer: AttentionLayer, heads: list[int], weights: Weights, packing: str | None
) -> MaskedWeight:
    projection = layer.projection
    if not isinstance(projection, nn.Linear | Conv1D):
        raise ValueError(
            f"model: the output projection of layer {layer.number} is a {type(projection).__name__}; only the columns "
            "of Linear and Conv1D are known"
        )
    weight = projection.weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    if len(names) > 1:
        raise ValueError(
            f"model: {' and '.join(names[:2])} are one weight, shared by several layers; heads of one layer alone "
            "cannot be zeroed in it"
        )
    tensor = _stored(model, names[0], weights, packing)
    if tensor.dtype not in FLOAT_BYTES or tensor.shape != tuple(weight.shape):
        raise _packed(tensor.name, f"it is stored as {tensor.dtype} {list(tensor.shape)}", packing)
    axis = 1 if isinstance(projection, nn.Linear) else 0
    width = weight.shape[axis] // head_count(layer)
    return MaskedWeight(tensor, [slice(head * width, (head + 1) * width) for head in heads], axis)


def _stored(model: PreTrainedModel, name: str, weights: Weights, packing: str | None) -> StoredTensor:
    """The tensor of a parameter in the files, where the modules around the layers may go by other names."""
    if name in weights:
        return weights[name]
    layers = decoder_layers(model)
    path = next(path for path, module in model.named_modules() if module is layers)
    *_, last = path.split(".")
    tail = f"{last}.{name.removeprefix(f'{path}.')}"  # "layers.3.self_attn.o_proj.weight"
    found = [stored for stored in weights if stored == tail or stored.endswith(f".{tail}")]
    if len(found) == 1:
        return weights[found[0]]
    if found:
        raise ValueError(f"model: {name} may be {' or '.join(found[:2])} in the files")
    raise _packed(name, "the files hold no weight of that name", packing)


def _packed(name: str, found: str, packing: str | None) -> ValueError:
    if packing is None:
        return ValueError(f"model: {name} cannot be masked: {found}")
    return ValueError(
        f"model: {name} cannot be masked: {found}, for the checkpoint is quantised ({packing}), which packs numbers or "
        "scales several of them together; mask the checkpoint that it was made from"
    )


def _write_weights(weights: Weights, masked: Sequence[MaskedWeight], scratch: Path) -> tuple[list[str], list[str]]:
    """Write all weight files; names of those that were changed, and of those that were not."""
    of_file: dict[Path, list[MaskedWeight]] = defaultdict(list)
    for weight in masked:
        of_file[weight.tensor.file].append(weight)
    for file in weights.files:
        written = scratch / file.name
        if file not in of_file:
            _link(file, written)
            continue
        shutil.copyfile(file, written)
        for weight in of_file[file]:
            zero_slices(written, weight.tensor, weight.features, weight.axis)
    rewritten = [file.name for file in weights.files if file in of_file]
    return rewritten, [file.name for file in weights.files if file not in of_file]


def _link(file: Path, written: Path) -> None:
    try:
        os.link(file.resolve(), written)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, written)


def _copy_alongside(folder: Path, scratch: Path) -> None:
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in ALONGSIDE or file.name.upper().startswith(LICENCES)
        if file.is_file() and wanted and file.name not in (PROVENANCE, SIZES_FILE) and not _of_pickles(file.name):
            shutil.copyfile(file, scratch / file.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, scratch / TEMPLATES)


def _of_pickles(name: str) -> bool:
    return name.endswith(".bin.index.json")


@contextlib.contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target`, in place of what is there, when the context ends without an exception."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".writing-"))
    try:
        (scratch / "new").mkdir()  # with the mode that the umask gives, unlike the scratch folder
        yield scratch / "new"
        if target.exists():
            os.replace(target, scratch / "old")
        os.replace(scratch / "new", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _provenance(source: ModelSource, folder: Path, scratch: Path, checkpoint: MaskedCheckpoint) -> dict[str, Any]:
    earlier = folder / PROVENANCE
    downloaded = str(folder) != source.place
    return {
        "what": "output projection columns of these heads are zero",
        "heads": [f"{layer}-{head}" for layer, head in checkpoint.heads],
        "parameters": checkpoint.parameters,
        "source": {
            "model": source.model,
            "revision": source.revision,
            "commit": folder.name if downloaded else None,  # of a hub id, as its cache names the folder
            "masked_heads": json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None,
            "sha256": {name: _sha256(folder / name) for name in checkpoint.rewritten},
        },
        "sha256": {name: _sha256(scratch / name) for name in sorted(checkpoint.rewritten + checkpoint.unchanged)},
        "locos_fast": __version__,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
