#!/usr/bin/env python3
"""Which neurons of a real model a text needs, token by token, for replay_neurons: what a pool of single neurons has to hold.

    trace_neurons.py PACKED --text TEXT --out trace.bin --keep 0.5 0.2 0.1
    replay_neurons trace.bin.50 30 50 70

A neuron is needed where its gate, |activation(gate)|, is above its layer's threshold, as CATS masks (predictors/cats): the
quantile over the first --calibrate tokens. These also say how often each neuron is needed, which is the order of the file of
single neurons; the --tokens after them are the trace. One file per --keep, OUT.PERCENT: four 32-bit numbers (magic, layers,
neurons, tokens), uint32 [layers, neurons] how often while calibrating, and bits [tokens, layers, neurons / 8], low bit first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

MAGIC, BLOCK = 0x52545253, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2, 0.1], help="share of the neurons")
    parser.add_argument("--calibrate", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    from sparse_run import _core
    from sparse_run.tokenizer import Tokenizer

    total = args.calibrate + args.tokens
    ids = Tokenizer.load(args.packed).encode(args.text.read_text(encoding="utf-8")[: total * 12])[:total]
    if len(ids) < total:
        parser.error(f"the text has {len(ids)} tokens, {total} are needed")
    model = _core.Model(str(args.packed), args.threads, True)
    config = json.loads(model.config_json)
    session = _core.Session(model, total)
    stream = session.embed(np.asarray(ids, np.int32))
    layers, neurons = config["n_layers"], config["n_ff"]
    often = {keep: np.zeros((layers, neurons), np.uint32) for keep in args.keep}
    bits = {keep: np.zeros((args.tokens, layers, (neurons + 7) // 8), np.uint8) for keep in args.keep}
    for layer in range(layers):
        gates = []
        for pos in range(0, total, BLOCK):
            stream[pos : pos + BLOCK], taps = session.run_layer(layer, pos, stream[pos : pos + BLOCK], taps=True)
            gates.append(np.abs(taps["G"]))
        gate = np.concatenate(gates)
        for keep in args.keep:
            needed = gate > np.quantile(gate[: args.calibrate], 1 - keep)
            often[keep][layer] = needed[: args.calibrate].sum(0)
            bits[keep][:, layer] = np.packbits(needed[args.calibrate :], axis=1, bitorder="little")
        print(f"layer {layer + 1} of {layers}", file=sys.stderr)
    for keep in args.keep:
        with Path(f"{args.out}.{keep * 100:.0f}").open("wb") as file:
            file.write(np.asarray([MAGIC, layers, neurons, args.tokens], np.uint32).tobytes())
            file.write(often[keep].tobytes() + bits[keep].tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
