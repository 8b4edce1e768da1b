"""GGUF as a source of conversion: finds the architecture, its hyper-parameters, its tensors and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, UnsupportedModelError, one_line
from .checkpoint import Checkpoint, CheckpointTensor
from .gguf_reader import GgufFile, GgufMetadata, GgufTensor
from .rows import FileRows, file_vector


def open_gguf(file: GgufFile) -> Checkpoint:
    """The checkpoint in an open file, which must stay open while it is converted."""
    from ..models import architectures, find_gguf
    from ..models.fields import HARMLESS_GGUF, Fields

    metadata, where = file.metadata, str(file.path)
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{where}: a file of the type {kind!r} is no model by itself; give the model's own file"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError(f"{where}: general.architecture is missing; the file holds no language model")
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(
            f"{where}: one of {parts} parts of a model; get the model in one file, or join the parts with llama.cpp's "
            "llama-gguf-split --merge"
        )
    architecture = find_gguf(name)
    if architecture is None:
        known = ", ".join(sorted(n for a in architectures() for n in a.gguf))
        raise UnsupportedModelError(f"{where}: the architecture {name!r} is not supported; supported: {known}")
    if architecture.gguf_config is None:
        raise UnsupportedModelError(f"{where}: {name!r} is supported as a Hugging Face directory only")
    fields = Fields(metadata, where, f"{name}.", file.tensors)
    decoder = architecture.gguf_config(fields, _vocabulary(metadata, where))
    fields.refuse_unknown(HARMLESS_GGUF)
    return Checkpoint(
        where=where,
        architecture=architecture,
        decoder=decoder,
        names={**architecture.gguf_names, **decoder.names},
        tensors={t.name: _tensor(file, t) for t in file.tensors.values()},
        about=_about(metadata, file.path),
        tokenizer=lambda directory: _export_tokenizer(metadata, where, directory),
    )


def _vocabulary(metadata: GgufMetadata, where: str) -> int:
    count = metadata.array_length("tokenizer.ggml.tokens")
    if not count:
        raise UnsupportedModelError(
            f"{where}: the file has no tokenizer; get one that was converted with its vocabulary"
        )
    return count


def _about(metadata: GgufMetadata, path: Path) -> dict[str, str]:
    def text(*keys: str) -> str | None:
        return next((metadata[k] for k in keys if isinstance(metadata.get(k), str) and metadata[k]), None)

    about = {
        "name": text("general.name", "general.basename") or path.stem,
        "license": text("general.license"),
        "source": text("general.repo_url", "general.source.repo_url", "general.source.url", "general.url"),
    }
    return {key: one_line(value, 200) for key, value in about.items() if value is not None}


def _tensor(file: GgufFile, tensor: GgufTensor) -> CheckpointTensor:
    # A vector may be stored with trailing dimensions of 1.
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1 and _is_vector(tensor.name):
        shape = shape[1:]
    return CheckpointTensor(
        tensor.name,
        shape,
        tensor.type.name,
        tensor.nbytes,
        lambda: FileRows(file, tensor, tensor.type),
        lambda: file_vector(file, tensor, tensor.type),
    )


def _is_vector(name: str) -> bool:
    return name.endswith((".bias", "_norm.weight", "rope_freqs.weight"))


def _export_tokenizer(metadata: GgufMetadata, where: str, directory: Path) -> None:
    from ..tokenizer import export_gguf

    try:
        export_gguf(metadata, directory)
    except ModelError as error:
        raise type(error)(f"{where}: {error}") from None
