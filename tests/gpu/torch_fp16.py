"""PyTorch in fp16 on the shapes of tests/gpu/bench.cc: the matrices of one decoded token, one after the other, in a CUDA
graph. `python3 tests/gpu/torch_fp16.py [LAYERS]`"""

from __future__ import annotations

import statistics
import sys

SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # outputs, inputs of q k v, o, gate up, down
HEAD = (32000, 4096)


def main(layers: int) -> None:
    import torch

    weights = [torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(layers) for shape in SHAPES]
    weights.append(torch.randn(HEAD, dtype=torch.float16, device="cuda"))
    inputs = {w.shape[1]: torch.randn(w.shape[1], dtype=torch.float16, device="cuda") for w in weights}

    def step() -> None:
        for w in weights:
            torch.mv(w, inputs[w.shape[1]])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    ms = statistics.median(times[2:])
    size = sum(w.numel() for w in weights) * 2
    print(
        f"PyTorch {torch.__version__} fp16, matrices only: {1e3 / ms:.1f} tok/s, {ms:.2f} ms, {size / ms / 1e6:.1f} GB/s "
        f"({size / 1e9:.2f} GB a token)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
