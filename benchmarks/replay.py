"""One call, captured once and timed many times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

RUNS = 20
TOGETHER = 8  # replays in a run
WARM_UP = 3


class Replay:
    """A call that is captured into a CUDA graph when this is made, and replayed to be timed.

    Without a GPU the call is simply made, so that a benchmark can be tried anywhere.

    Args:
        call: works on tensors that stay where they are; it is made once before the capture.
    """

    captures = 0  # since the program began

    def __init__(self, call: Callable[[], object]) -> None:
        self.run: Callable[[], object] = call
        if not torch.cuda.is_available():
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._output = call()  # kept: the graph writes to it
        torch.cuda.current_stream().wait_stream(stream)
        self.run = graph.replay
        Replay.captures += 1

    def milliseconds(self, prepare: Callable[[int], object] = lambda _: None, runs: int = RUNS) -> float:
        """Median time of a replay in runs of several that follow each other as tokens do, so that none waits for its
        launch; `prepare(i)` is called before the i-th run, and not timed."""
        return median_milliseconds(self._run_together, prepare, runs) / TOGETHER

    def _run_together(self) -> None:
        for _ in range(TOGETHER):
            self.run()


def median_milliseconds(
    call: Callable[[], object], prepare: Callable[[int], object] = lambda _: None, repeats: int = RUNS
) -> float:
    """Median time of a call by the GPU's own clock, or without a GPU by the processor's; `prepare` is not timed."""
    times = []
    for i in range(WARM_UP + repeats):
        prepare(i)
        times.append(_milliseconds_on_gpu(call) if torch.cuda.is_available() else _milliseconds_on_cpu(call))
    return statistics.median(times[WARM_UP:])


def _milliseconds_on_gpu(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _milliseconds_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
