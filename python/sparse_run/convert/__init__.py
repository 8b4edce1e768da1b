"""Checkpoints to packed models (models/format.md): exact, streamed, all or nothing.

>>> from sparse_run.convert import convert
>>> convert("model.gguf", "model.packed")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .layout import LayoutChoice
    from .measure import Quality
    from .quantise import Quantisation
    from .writer import Existing, ProgressCallback

__all__ = ["convert", "convert_gguf", "open_checkpoint", "source_files"]


def source_files(src: Path) -> list[Path]:
    """The files that make a source: the GGUF file itself, or the configuration, weights and tokenizer of a directory.
    Raises ModelError where there is nothing that can be converted."""
    if src.is_dir():
        weights = sorted(src.glob("*.safetensors"))
        if not (src / "config.json").is_file() or not weights:
            pickles = [p for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(src.glob(pattern))]
            if pickles and not weights:
                raise ModelError(
                    f"{src}: its weights ({pickles[0].name}) are pickles, which run code when they are read; get them as "
                    "safetensors or GGUF"
                )
            ggufs = sorted(src.glob("*.gguf"))
            hint = f"; give one of its .gguf files, as {ggufs[0]}" if ggufs else "; give a .gguf file or a packed model"
            raise ModelError(f"{src}: a directory with neither a packed model nor config.json and *.safetensors{hint}")
        others = [p for pattern in ("*.json", "*.model", "*.jinja") for p in src.glob(pattern)]
        return weights + sorted(others)
    if not src.exists():
        raise ModelError(f"{src}: no such file; check the path")
    if not src.is_file():
        raise ModelError(f"{src}: not a regular file; give a .gguf file or a model directory")
    return [src]


@contextlib.contextmanager
def open_checkpoint(src: Path) -> Iterator[Checkpoint]:
    """Opens a source for `info` or conversion. Raises ModelError or UnsupportedModelError with a line that names it."""
    from .gguf import open_gguf
    from .gguf_reader import GgufFile
    from .hf import open_hf

    source_files(src)
    if src.is_dir():
        with open_hf(src) as checkpoint:
            yield checkpoint
    else:
        with GgufFile(src) as file:
            yield open_gguf(file)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    layout: LayoutChoice = "auto",
    existing: Existing = "refuse",
    progress: ProgressCallback | None = None,
    quantisation: Quantisation | None = None,
    calibration: str | None = None,
    report_text: str | None = None,
) -> Quality | None:
    """Makes the packed model `dst` from the checkpoint `src`, in memory below twice its largest tensor plus 200 MB. Weights
    keep their values and bits unless `quantisation` rounds them.

    `layout` says how what feeds the FFN's neurons is stored: `panels` (input by input; thresholds at site M), `neurons`
    (neuron by neuron; sites G and N, exact zeros), or `auto`, which is `neurons` where the activation gives exact zeros.

    `calibration`, a text, is run through the source first; rounding then favours the columns whose inputs are large.
    `report_text` is run through source and result afterwards: the answer is what rounding costs there (else None). Both make a
    temporary copy of the source beside `dst`, and need the memory of running it.

    `progress(what, done, total)` is called in bytes, or in steps of a run. Raises ModelError where the source is missing,
    damaged or unsupported, UsageError where `dst` exists and `existing` (see `write_packed`) does not allow it or a text is too
    short, Error where the disk is full or cannot be written; nothing remains in these cases.
    """
    from ..tokenizer import Tokenizer
    from . import measure
    from .checkpoint import convert_checkpoint
    from .identity import BackgroundHash, identify
    from .quantise import Quantisation, Rounding
    from .staging import StagedDirectory
    from .writer import add_to_record, check_destination

    src, dst = Path(src), Path(dst)
    files = source_files(src)
    identity = identify(files, layout=layout)
    check_destination(dst, existing)
    if quantisation is None and (calibration is not None or report_text is not None):
        raise UsageError("a calibration or report text is of use only where weights are rounded; give --bits too")
    with open_checkpoint(src) as checkpoint, contextlib.ExitStack() as stack:
        full_hash = BackgroundHash(files)
        stack.callback(full_hash.stop)

        def source() -> dict[str, Any]:
            sha256 = full_hash.result()
            if sha256 is None or identify(files, layout=layout) != identity:
                raise ModelError(f"{src}: changed while it was being converted; convert it again")
            return {
                "schema": 1,
                "path": str(src.resolve()),
                "size": identity.size,
                "date": _iso(identity.date),
                "sha256": sha256,
                "content": identity.content,
                "key": identity.key,
                "layout": layout,
                "tool": f"sparse-run {_version()}",
            }

        rounding = None if quantisation is None else Rounding(quantisation)
        chunks = reference = None
        if rounding is not None and (calibration is not None or report_text is not None):
            # The copy is for running only: 8 bits are enough to see inputs, a report is about the source itself.
            reference = stack.enter_context(StagedDirectory(dst)).path / "reference"
            copy = None if report_text is not None else Rounding(Quantisation(8))
            convert_checkpoint(
                checkpoint,
                reference,
                source=dict,
                layout="panels",
                existing="overwrite",
                progress=progress,
                rounding=copy,
            )
            tokenizer = Tokenizer.load(reference)
            if report_text is not None:
                chunks = measure.chunks_of(
                    tokenizer, report_text, measure.REPORT_CHUNKS, "the report's text", spread=False
                )
            if calibration is not None:
                measure.calibrate(rounding, checkpoint, reference, tokenizer, calibration, progress)
        convert_checkpoint(
            checkpoint,
            dst,
            source=source,
            layout=layout,
            existing=existing,
            progress=progress,
            rounding=rounding,
        )
        if chunks is None or reference is None:
            return None
        quality = measure.compare_models(reference, dst, chunks, progress)
        add_to_record(dst, "quality", quality.as_dict())
        return quality


def convert_gguf(src: Path, dst: Path, progress: ProgressCallback | None = None) -> None:
    """`convert` for a GGUF file."""
    convert(src, dst, progress=progress)


def _iso(seconds: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _version() -> str:
    from .. import _core

    return _core.__version__
