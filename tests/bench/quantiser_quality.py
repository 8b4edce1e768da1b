#!/usr/bin/env python3
"""Our quantiser against llama.cpp's Q4_K_M on weights of one source: perplexity and KL divergence from that source, with the
bits per weight of each file.

The checkpoints that a package index carries are quantised already, and a file dequantised from 4 bits still has its grid,
which a quantiser finds again. So the source is SmolLM2 turned: the residual stream is rotated at random into 768 dimensions
(an isometry, norms folded into the matrices, the head untied). Its outputs are those of SmolLM2, its weights lie on no grid,
and its rows are whole blocks of 256, which llama.cpp's K types need. `--source` takes MODEL,
any F16 or F32 GGUF, as it is.

Each candidate is evaluated by the engine that it was made for; KL is measured in this engine only, where llama.cpp's file
runs too. Errors are standard errors over chunks; `against` compares with the first candidate on the same chunks. The weights
that `--bits auto` deals bits out by were fitted near the beginning of WikiText-2's test text: `--skip` leaves that out.

    quantiser_quality.py SmolLM2-135M-Instruct.Q4_1.gguf --peer-python PEER --text wiki.test.raw --calibration c4.txt
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

WIDTH = 768  # of the turned residual stream
QUANTISE = (
    "import sys, llama_cpp\n"
    "p = llama_cpp.llama_model_quantize_default_params()\n"
    "p.ftype = getattr(llama_cpp, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3]); p.nthread = 2\n"
    "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))\n"
)


def turned(source: Path, out: Path, seed: int = 0) -> Path:
    """The same function with its residual stream turned by a random isometry, as F16."""
    import gguf
    import numpy as np
    from llama_gguf import LlamaShape, TensorSource, Vocabulary, write_llama_gguf

    reader = gguf.GGUFReader(str(source))
    meta = {name: field.contents() for name, field in reader.fields.items()}
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    if "output.weight" not in weights:
        weights["output.weight"] = weights["token_embd.weight"]
    old = meta["llama.embedding_length"]
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, old)))
    shrink = math.sqrt(old / WIDTH)  # the root mean square of the wider stream is smaller by this
    shape = LlamaShape(
        n_layers=meta["llama.block_count"],
        n_embd=WIDTH,
        n_heads=meta["llama.attention.head_count"],
        n_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=old // meta["llama.attention.head_count"],
        n_ff=meta["llama.feed_forward_length"],
        n_vocab=len(meta["tokenizer.ggml.tokens"]),
        tied=False,
        n_ctx=meta["llama.context_length"],
        rope_theta=meta["llama.rope.freq_base"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"] * shrink**2,
    )
    norms = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm", "ffn_gate": "ffn_norm", "ffn_up": "ffn_norm"}

    def make(name: str) -> Any:
        w, kind = weights[name], name.split(".")[-2]
        if kind.endswith("norm"):
            return np.full(WIDTH, shrink, np.float32)
        if name == "token_embd.weight":
            w = w @ q.T
        elif name == "output.weight":
            w = (w * weights["output_norm.weight"]) @ q.T
        elif kind in norms:
            w = (w * weights[name.replace(kind, norms[kind])]) @ q.T
        else:  # attn_output, ffn_down
            w = q @ w
        return w.astype(np.float16)

    sources = []
    for name, dims in shape.tensors():
        vector = len(dims) == 1
        kind = gguf.GGMLQuantizationType.F32 if vector else gguf.GGMLQuantizationType.F16
        nbytes = math.prod(dims) * (4 if vector else 2)
        sources.append(TensorSource(name, dims, kind, nbytes, lambda name=name: make(name)))
    vocabulary = Vocabulary(
        meta["tokenizer.ggml.model"],
        meta["tokenizer.ggml.tokens"],
        meta["tokenizer.ggml.token_type"],
        meta["tokenizer.ggml.bos_token_id"],
        meta["tokenizer.ggml.eos_token_id"],
        merges=meta["tokenizer.ggml.merges"],
        pre=meta["tokenizer.ggml.pre"],
        add_bos=bool(meta.get("tokenizer.ggml.add_bos_token", False)),
    )
    return write_llama_gguf(out, shape, sources, vocabulary, name="SmolLM2 turned")


def peer_perplexity(python: str, script: Path, model: Path, text: Path, chunks: int) -> float:
    command = [python, str(script), "ppl", str(model), "--text", str(text), "--chunks", str(chunks)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["perplexity"])


class Scores:
    """Of every scored token, [chunks, tokens]: surprise under the source and under a candidate, KL divergence of the candidate
    from the source, and whether both would choose the same token."""

    def __init__(self, source: Path, candidate: Path, chunks: Any) -> None:
        import numpy as np
        from sparse_run import _core
        from sparse_run.eval.perplexity import log_softmax

        half = chunks.shape[1] // 2
        rows: list[list[Any]] = [[], [], [], []]
        models = [_core.Model(str(path), 2) for path in (source, candidate)]
        try:
            sessions = [_core.Session(model, chunks.shape[1]) for model in models]
            for chunk in chunks:
                for session in sessions:
                    session.truncate(0)
                    session.eval(chunk[:half])
                p, q = (log_softmax(session.eval_all(chunk[half:-1])) for session in sessions)
                at, targets = np.arange(len(p)), chunk[half + 1 :]
                found = (-p[at, targets], -q[at, targets], (np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1))
                for row, values in zip(rows, found, strict=True):
                    row.append(np.asarray(values, np.float64))
        finally:
            for model in models:
                model.close()
        self.before, self.after, self.kl, self.same = (np.stack(row) for row in rows)

    def summary(self, base: Scores) -> dict[str, float]:
        import numpy as np

        def mean(name: str, values: Any) -> dict[str, float]:
            by_chunk = values.mean(1)
            error = by_chunk.std(ddof=1) / math.sqrt(len(by_chunk))
            return {name: float(by_chunk.mean()), f"{name}_stderr": float(error)}

        return {
            "perplexity": math.exp(self.after.mean()),
            "perplexity_source": math.exp(self.before.mean()),
            **mean("log_increase", self.after - self.before),
            **mean("kl", self.kl),
            **mean("log_against", self.after - base.after),
            **mean("kl_against", self.kl - base.kl),
            "same_choice": float(np.mean(self.same)),
        }


def stored_bits(packed: Path) -> float:
    """Bits a weight of a packed model's matrices."""
    from sparse_run.convert.describe import describe

    return float(describe(packed)["bits_per_weight"])


def file_bits(gguf_file: Path) -> float:
    """Bits a weight of a GGUF file's matrices."""
    import gguf

    matrices = [t for t in gguf.GGUFReader(str(gguf_file)).tensors if len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2 as GGUF, or with --source any F16 or F32 GGUF to take as it is")
    parser.add_argument("--source", action="store_true", help="take MODEL as the source, do not turn it")
    parser.add_argument("--peer-python", required=True, help="an interpreter with llama-cpp-python")
    parser.add_argument("--peer-script", type=Path, default=ROOT.parent / "shared" / "peers" / "llamacpp_bench.py")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0, help="characters of TEXT to leave out at its beginning")
    parser.add_argument("--peer-types", default="Q4_K_M,Q4_K_S,Q4_0")
    parser.add_argument("--bpw", default="4.5,4.8,5.0", help="targets of --bits auto")
    args = parser.parse_args()

    from sparse_run.convert import convert, measure
    from sparse_run.convert.quantise import Quantisation
    from sparse_run.tokenizer import Tokenizer

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = args.model if args.source else turned(args.model, work / "source.gguf")
        convert(source, work / "source")
        text = args.text.read_text(encoding="utf-8")[args.skip :]
        (work / "text").write_text(text, encoding="utf-8")
        base: Scores | None = None
        chunks = measure.chunks_of(Tokenizer.load(work / "source"), text, args.chunks, str(args.text), spread=False)
        if len(chunks) < 2:
            parser.error("errors are taken over chunks: give --chunks 2 or more, and a text of as many")

        def add(name: str, packed: Path, bits: float, peer: float | None = None) -> None:
            nonlocal base
            scores = Scores(work / "source", packed, chunks)
            base = base or scores
            q = scores.summary(base)
            rows.append({"name": name, "bits_per_weight": bits, "perplexity_peer": peer, **q})
            print(
                f"{name:<40} {bits:5.2f} bits  perplexity {q['perplexity']:8.3f} (source {q['perplexity_source']:.3f}, "
                f"{math.expm1(q['log_increase']):+.1%} +- {q['log_increase_stderr']:.1%})  KL {q['kl']:.4f}  against the "
                f"first {math.expm1(q['log_against']):+.1%} +- {q['log_against_stderr']:.1%}, KL {q['kl_against']:+.4f} +- "
                f"{q['kl_against_stderr']:.4f}  same choice {q['same_choice']:.1%}"
                + (f"  llama.cpp itself {peer:.3f}" if peer else ""),
                file=sys.stderr,
            )

        for kind in filter(None, args.peer_types.split(",")):
            path = work / f"{kind}.gguf"
            command = [args.peer_python, "-c", QUANTISE, str(source), str(path), kind]
            subprocess.run(command, check=True, capture_output=True)
            convert(path, work / "candidate", existing="overwrite")
            peer = peer_perplexity(args.peer_python, args.peer_script, path, work / "text", args.chunks)
            add(f"llama.cpp {kind}", work / "candidate", file_bits(path), peer)
        calibration = args.calibration.read_text(encoding="utf-8") if args.calibration else None
        ours = [("--bits 4", Quantisation(4))]
        ours += [(f"--bits auto --target-bpw {b}", Quantisation(0, 32, float(b))) for b in args.bpw.split(",")]
        for name, quantisation in ours:
            for words in (None, calibration) if calibration else (None,):
                convert(source, work / "candidate", existing="overwrite", quantisation=quantisation, calibration=words)
                add(name + (" --calibration" if words else ""), work / "candidate", stored_bits(work / "candidate"))
    print(json.dumps({"schema": 1, "chunks": len(chunks), "ctx": measure.CONTEXT, "results": rows}))


if __name__ == "__main__":
    main()
