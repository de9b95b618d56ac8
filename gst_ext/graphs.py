"""CUDA graphs: a training or evaluation step is captured once and then replayed by one launch.

    graphs = Graphs(enabled)
    for epoch in range(epochs):
        graphs.clear_unless(lr, shapes)  # a graph contains the numbers and shapes of its capture
        total, order = graphs.static("train", total, order)
        for index in batches:
            graphs.run("train", step, index)  # step(index) reads order[index] and adds to total
"""
import contextlib
import time

import torch

from .errors import first_line, warn_once

WARM_UP_CALLS = 3  # the libraries choose their algorithms in a step's first calls


class Graphs:
    """The CUDA graphs of one run's steps; when not enabled, steps are called directly.

    A graph reads and writes the addresses of its capture: what a step uses beside its index and
    the network must come from `static`.

    Args:
        enabled: Whether to capture steps, for a run on a CUDA device.
    """

    def __init__(self, enabled):
        self.enabled, self.key, self.last_graph = enabled, None, None
        self.num_calls, self.replays, self.tensors = {}, {}, {}

    def clear_unless(self, *key):
        """Drops all graphs unless `key` equals that of the last call.

        Args:
            key: What a captured graph contains as constants: numbers and shapes.
        """
        if key != self.key:
            self.key = key
            self.num_calls, self.replays, self.tensors = {}, {}, {}

    def static(self, name, *tensors):
        """Returns the tensors, copied to the addresses that the graphs of that name use.

        The first ones of a name keep theirs, so the caller must make new ones for each call.
        """
        if not self.enabled:
            return tensors
        static = self.tensors.setdefault(name, tensors)
        for old, new in zip(static, tensors):
            old.copy_(new)
        return static

    def run(self, name, step, index):
        """Calls step(index), or replays its graph after WARM_UP_CALLS calls of that name and size.

        If a capture fails, steps are called directly from then on.

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not hold the graph.
        """
        if not self.enabled:
            return step(index)
        key = name, len(index)
        index, = self.static(key, index)
        self.num_calls[key] = self.num_calls.get(key, 0) + 1
        if self.num_calls[key] <= WARM_UP_CALLS:
            return step(index)
        if key not in self.replays:
            try:
                self.replays[key] = self.capture(step, index)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.enabled = False
                warn_once(f"a step cannot be captured as a CUDA graph ({first_line(error)}); the "
                          "run continues without graphs, slower. --no-cuda-graphs avoids the try")
                return step(index)
        self.replays[key]()

    def capture(self, step, index):
        """Captures step(index) without running it; returns the function that replays it.

        All graphs of a run share one memory pool, since they are replayed one after the other and
        none reads what another left there. The last graph is kept alive so that the next can
        reuse its pool; otherwise the memory is returned by empty_cache only, which synchronizes.
        """
        graph = torch.cuda.CUDAGraph()
        pool = [self.last_graph.pool()] if self.last_graph else []
        interruptible_sync()
        graph.capture_begin(*pool, capture_error_mode="thread_local")
        try:
            step(index)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                graph.capture_end()
            raise
        graph.capture_end()
        self.last_graph = graph
        return graph.replay


def interruptible_sync():
    """Waits for the current CUDA stream; signals such as SIGTERM are handled meanwhile."""
    done = torch.cuda.current_stream().record_event()
    while not done.query():
        time.sleep(0.0005)


def to_list(tensor):
    """Returns tensor.tolist(), waiting with interruptible_sync on a GPU."""
    if tensor.is_cuda:
        interruptible_sync()
    return tensor.tolist()


def side_stream(device):
    """Returns a context manager that enters a new CUDA stream, which a capture needs."""
    if device.type != "cuda":
        return torch.cuda.stream(None)
    torch.cuda.synchronize(device)  # the stream must see what was prepared on the default one
    return torch.cuda.stream(torch.cuda.Stream(device))
