"""PyTorch in fp16 on the shapes of tests/gpu/bench.cc: the matrices of one decoded token, one after the other, in a CUDA graph.

`python3 tests/gpu/torch_fp16.py [LAYERS]`; with 0 layers two small ones, on the CPU where there is no GPU, which shows that the
program works.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # outputs, inputs of q k v, o, gate up, down
HEAD = (32000, 4096)
SMALL = 16  # what the small shapes are divided by


def main(layers: int) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() or layers else "cpu"
    by = 1 if layers else SMALL
    shapes = [*(SHAPES * (layers or 2)), HEAD]
    weights = [torch.randn(n // by, k // by, dtype=torch.float16, device=device) for n, k in shapes]
    inputs = {w.shape[1]: torch.randn(w.shape[1], dtype=torch.float16, device=device) for w in weights}

    def step() -> None:
        for w in weights:
            torch.mv(w, inputs[w.shape[1]])

    def seconds(run: Callable[[], object]) -> float:
        if device == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    run: Callable[[], object] = step
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # the weights are there
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    times = [seconds(run) for _ in range(14)][2:]
    median = statistics.median(times)
    size = sum(w.numel() for w in weights) * 2
    print(
        f"PyTorch {torch.__version__} fp16 on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}, matrices of "
        f"{layers or 2} {'layers' if layers else 'small layers'} and head only: {1 / median:.1f} tok/s, {1e3 * median:.2f} ms "
        f"({1e3 * min(times):.2f} to {1e3 * max(times):.2f}), {size / median / 1e9:.1f} GB/s ({size / 1e9:.2f} GB a token)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
