"""A Hugging Face directory as a source of conversion: config.json, safetensors files (one or sharded), tokenizer files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedModelError, one_line
from .checkpoint import Checkpoint, CheckpointTensor
from .int4 import Placed, packed_matrices
from .rows import FileRows, file_vector
from .safetensors_reader import SafetensorsFile, SafetensorsTensor
from .ternary import ternary_matrices

if TYPE_CHECKING:
    from ..models.common import Architecture, Decoder

INDEX = "model.safetensors.index.json"
_CARD_BYTES = 1 << 16


@contextlib.contextmanager
def open_hf(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoint in a directory; its files are open meanwhile."""
    from ..models.fields import HARMLESS_HF, Fields

    config = read_json(directory / "config.json")
    architecture = _architecture(config, directory)
    if architecture.hf_config is None:
        raise UnsupportedModelError(f"{directory}: {architecture.name!r} is supported as a GGUF file only")
    fields = Fields(_decoder_part(config, architecture), str(directory / "config.json"))
    decoder = architecture.hf_config(fields, fields.integer("vocab_size", architecture.hf_vocabulary))
    fields.refuse_unknown(HARMLESS_HF)
    with contextlib.ExitStack() as stack:
        placed: dict[str, Placed] = {}
        for path in _weight_files(directory):
            file = stack.enter_context(SafetensorsFile(path))
            for tensor in file.tensors.values():
                name = _renamed(tensor.name, architecture.hf_renames)
                if name in placed:
                    raise ModelError(f"{path}: tensor {tensor.name} is in another file too; fetch the directory again")
                placed[name] = (file, tensor)
        names = {**architecture.hf_names, **decoder.names}
        tensors = _tensors(config.get("quantization_config"), placed, decoder, names, str(directory))
        head = architecture.hf_names["output"]
        if decoder.config.get("tied_embeddings"):
            tensors.pop(head, None)  # some files repeat the embedding there
        elif head not in tensors:
            raise ModelError(f"{directory}: tensor {head} is missing; fetch the directory again")
        yield Checkpoint(
            where=str(directory),
            architecture=architecture,
            decoder=decoder,
            names=names,
            norm_offset=architecture.hf_norm_offset,
            positions_offset=architecture.hf_positions_offset,
            tensors=tensors,
            about={"name": directory.resolve().name, **_card(directory, config)},
            tokenizer=partial(_export_tokenizer, directory, decoder.config["n_vocab"]),
        )


def _card(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Licence and source, as far as the model's card (the head of README.md) and config.json tell."""
    about = {}
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", origin):
        about["source"] = origin
    try:
        with open(directory / "README.md", encoding="utf-8", errors="replace") as file:
            head = file.read(_CARD_BYTES).split("\n---", 1)[0]
    except OSError:
        return about
    if head.startswith("---"):
        entries = dict(re.findall(r"^(license|license_name):[ \t]*([^\n#]+)$", head, flags=re.MULTILINE))
        # "other" stands for what license_name names.
        name = entries.get("license_name") if entries.get("license", "other").strip() == "other" else None
        licence = (name or entries.get("license", "")).strip().strip("'\"")
        if licence:
            about["license"] = one_line(licence, 200)
    return about


def _tensors(
    quantisation: Any, placed: Mapping[str, Placed], decoder: Decoder, names: Mapping[str, str], where: str
) -> dict[str, CheckpointTensor]:
    """All tensors by name; those that make a quantised matrix together are one."""
    if not quantisation:
        return {name: _tensor(*place) for name, place in placed.items()}
    if not isinstance(quantisation, dict):
        raise ModelError(f"{where}/config.json: quantization_config is not an object; fetch the directory again")
    plain = {name: _tensor(*place) for name, place in placed.items()}
    if quantisation.get("quant_method") == "bitnet":
        matrices, used = ternary_matrices(quantisation, placed, plain, where)
    else:
        matrices, used = packed_matrices(quantisation, placed, where)
    tensors = {name: tensor for name, tensor in plain.items() if name not in used} | matrices
    # Older files have a bias of zeros beside every quantised matrix.
    known = {names[role] for role in (*decoder.required, *decoder.optional) if role in names}
    for name in matrices:
        bias = name.removesuffix("weight") + "bias"
        if bias in tensors and re.sub(r"\.\d+\.", ".{i}.", bias) not in known and not tensors[bias].vector().any():
            del tensors[bias]
    return tensors


def _decoder_part(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """What config.json says of the decoder; the models around it have theirs beside it."""
    inner = config.get(architecture.hf_nested) if architecture.hf_nested else None
    if not isinstance(inner, dict):
        return config
    kept = {key: config[key] for key in ("architectures", "tie_word_embeddings") if key in config}
    return {**kept, **inner, "architectures": config["architectures"]}


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ModelError where it cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); check that it is there and its permissions"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not JSON; the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; the file is damaged, fetch it again")
    return value


def _architecture(config: Mapping[str, Any], directory: Path) -> Architecture:
    from ..models import architectures, find_hf

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise ModelError(f"{directory}/config.json names no architecture; the directory holds no language model")
    architecture = find_hf(name)
    if architecture is None:
        known = ", ".join(sorted(n for a in architectures() for n in a.hf))
        raise UnsupportedModelError(f"{directory}: the architecture {name!r} is not supported; supported: {known}")
    return architecture


def _weight_files(directory: Path) -> list[Path]:
    if not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{directory / INDEX}: no weight_map; the file is damaged, fetch it again")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{directory / INDEX}: names the file {name!r} outside the directory; fetch it again")
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: the file {name} is missing; fetch the directory again")
    return [directory / name for name in names]


def _tensor(file: SafetensorsFile, tensor: SafetensorsTensor) -> CheckpointTensor:
    def rows() -> FileRows:
        return FileRows(file, tensor, tensor.float_type(file.path))

    return CheckpointTensor(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tensor.nbytes,
        rows,
        lambda: file_vector(file, tensor, tensor.float_type(file.path)),
    )


def _export_tokenizer(source: Path, n_vocab: int, directory: Path) -> None:
    from ..tokenizer import export_hf

    export_hf(source, directory, n_vocab)
