"""What a model is made of, from its header alone: hyper-parameters, and bits and bytes by class of weights."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .layout import PAD_PREFIX, by_neuron

CLASSES = ("embedding", "attention", "ffn", "head", "other")
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class _Weights:
    role: str
    parameters: int
    nbytes: int
    kind: str


def describe(path: Path) -> dict[str, Any]:
    """Facts about a GGUF file, a directory of safetensors, or a packed model, with the keys that `info --json` prints.
    Raises ModelError where it cannot be read or is not supported."""
    from .writer import is_packed

    return _describe_packed(path) if is_packed(path) else _describe_checkpoint(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from ..models.common import check_config
    from . import open_checkpoint
    from .checkpoint import match_roles

    with open_checkpoint(path) as checkpoint:
        config = checkpoint.decoder.config
        check_config(config, checkpoint.where)
        roles = match_roles(checkpoint)
        weights = [_Weights(role, prod(t.shape), t.nbytes, t.type) for role, t in roles.items()]
        about = {**checkpoint.about, "architecture": checkpoint.architecture.name}
        config = {**about, **config, "tied_embeddings": "output" not in roles}
        kind = "safetensors" if path.is_dir() else "gguf"
        scaled = checkpoint.decoder.rope_scaling.factors is not None or "rope_factors" in roles
        return {"path": str(path), "format": kind, **_facts(config, scaled), "natural_sparsity": None, **_sizes(weights)}


def _describe_packed(path: Path) -> dict[str, Any]:
    from ..registry import read_source

    config = _read_json(path / "config.json", (path / "config.json").stat().st_size)
    weights, layouts = [], set()
    for name, entry, layout in _packed_tensors(path / "weights.safetensors"):
        if layout is None:
            weights.append(_Weights(name, prod(entry["shape"]), prod(entry["shape"]) * 4, "f32"))
            continue
        kind = layout["kind"] + ("" if "group" not in layout else f" group {layout['group']}")
        kind += " min" if layout.get("min") else ""
        kind += " in superblocks" if "superblock" in layout else ""
        rows = layout["rows"] if layout["layout"] == "panels" else layout["neurons"] * (2 if layout["gated"] else 1)
        weights.append(_Weights(name, rows * layout["cols"], prod(entry["shape"]), kind))
        if layout["layout"] == "neurons":
            layouts.add("neurons")
        elif name.split(".")[2:3] in (["ffn_gate_up"], ["ffn_up"]):
            layouts.add("panels")
    scaled = any(w.role.startswith("rope_factors") for w in weights)
    record = read_source(path)
    origin = {key: record[key] for key in ("path", "sha256", "date", "tool", "tensor_types", "quantised") if key in record}
    measured = {key: record.get(key) for key in ("natural_sparsity", "quality")}
    try:
        facts = _facts(config, scaled)
    except KeyError as error:
        raise ModelError(f"{path}/config.json lacks {error}; convert the model again") from None
    return {"path": str(path), "format": "packed", **facts, "layout": ", ".join(sorted(layouts)), **measured, **_sizes(weights), "made_from": origin}


def _read_json(path: Path, length: int, offset: int = 0) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            value = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError:
        raise ModelError(f"{path}: damaged; convert the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: damaged; convert the model again")
    return value


def _packed_tensors(path: Path) -> Iterable[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Name, header entry, and layout (None for plain vectors) of every tensor."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if length > min(size - 8, _MAX_HEADER):
        raise ModelError(f"{path}: damaged; convert the model again")
    header = _read_json(path, length, 8)
    metadata = header.pop("__metadata__", {})
    try:
        for name, entry in header.items():
            if not name.startswith(PAD_PREFIX):
                layout = metadata.get(f"layout:{name}")
                yield name, entry, None if layout is None else json.loads(layout)
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"{path}: damaged; convert the model again") from None


def _facts(config: dict[str, Any], rope_scaled: bool) -> dict[str, Any]:
    windows = config.get("window") or []
    return {
        "name": config.get("name"),
        "architecture": config["architecture"],
        "license": config.get("license"),
        "source": config.get("source"),
        "layers": config["n_layers"],
        "embedding": config["n_embd"],
        "heads": config["n_heads"],
        "kv_heads": config["n_kv_heads"],
        "head_dim": config["head_dim"],
        "ffn": config["n_ff"],
        "ffn_kind": "gated" if config["ffn_gated"] else "plain",
        "activation": config["activation"],
        "activation_threshold": config.get("activation_threshold") or None,
        "up_relu": bool(config.get("up_relu")),
        "exact_zeros": by_neuron("auto", config),
        "norm": config["norm"],
        "vocabulary": config["n_vocab"],
        "context": config["n_ctx_train"],
        "window": max(windows) if any(windows) else None,
        "rope_theta": config.get("rope_theta"),
        "rope_scaled": rope_scaled,
        "tied_embeddings": config["tied_embeddings"],
    }


def _class_of(role: str) -> str:
    name = role.split(".", 2)[2] if role.startswith("layers.") else role
    if name == "token_embd":
        return "embedding"
    if name == "output":
        return "head"
    if "norm" not in name and name.startswith(("attn_", "ffn_")):
        return "attention" if name.startswith("attn_") else "ffn"
    return "other"


def _sizes(weights: list[_Weights]) -> dict[str, Any]:
    groups: dict[str, list[_Weights]] = defaultdict(list)
    for w in weights:
        groups[_class_of(w.role)].append(w)

    def summary(members: list[_Weights]) -> dict[str, Any]:
        parameters, nbytes = sum(w.parameters for w in members), sum(w.nbytes for w in members)
        kinds = sorted({w.kind for w in members})
        return {
            "parameters": parameters,
            "bytes": nbytes,
            "bits_per_weight": round(8 * nbytes / parameters, 3) if parameters else 0.0,
            "kinds": kinds,
        }

    matrices = [w for w in weights if _class_of(w.role) != "other"]
    return {
        "parameters": sum(w.parameters for w in weights),
        "bytes": sum(w.nbytes for w in weights),
        "bits_per_weight": summary(matrices)["bits_per_weight"],
        "weights": {name: summary(groups[name]) for name in CLASSES if groups[name]},
    }
