"""A step as a CUDA graph: what a step asks of the host becomes one call.

    graphs = new_graphs(device)  # None where steps are not captured
    for epoch in range(epochs):
        hold_for(graphs, lr, shapes)  # a graph holds fast what was a number or a shape when it was captured
        total, at, order = fed(graphs, "train", total, at, order)
        for _ in range(steps):
            replayed(graphs, "train", step, batch_size)  # step(batch_size) finds its batch by `at`, and moves it on
"""
import contextlib
import time

import torch

from . import files

GRAPHED = ("cuda",)  # devices whose steps are captured
STREAMS = 32  # PyTorch has so many to give: more would be shared
WARM_UP = 3  # calls of a step before it becomes a graph: the libraries choose their algorithms in them


def new_graphs(device):
    """What keeps a run's graphs on `device`; None where there are none."""
    return {} if device.type in GRAPHED else None


def hold_for(graphs, *facts):
    """Clears the graphs unless `facts`, whatever they hold fast, are those of the last call."""
    if graphs is not None and graphs.get("facts") != facts:
        kept = {name: graphs[name] for name in ("given up", "last") if name in graphs}
        graphs.clear()
        graphs |= kept | {"facts": facts}


def fed(graphs, name, *tensors):
    """The tensors, at the addresses that captured graphs of that name read and write."""
    if graphs is None:
        return tensors
    held = graphs.setdefault(("fed", name), [t.clone() for t in tensors])
    for mine, new in zip(held, tensors):
        mine.copy_(new)
    return held


def replayed(graphs, name, function, size):
    """function(size); on a GPU from a CUDA graph, after WARM_UP calls of that name and size.

    A replay is all that a step asks of the host: the driver queues about a thousand launches, and a run that fills the
    queue keeps the other runs' waiting. So function itself finds its batch and adds up what it finds, in tensors that
    are `fed`. graphs (from new_graphs) keeps the graphs; hold_for tells it of the network's shapes and the learning
    rate, which a graph holds fast. Without graphs (None) it is called as it is, and once a capture has failed, but
    for want of memory: that raises OutOfMemoryError.
    """
    if graphs is None or graphs.get("given up"):
        return function(size)
    calls = graphs[name, size, "calls"] = graphs.get((name, size, "calls"), 0) + 1
    if calls <= WARM_UP:
        return function(size)
    if (name, size) not in graphs:
        try:
            graphs[name, size] = record(lambda: function(size), graphs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            graphs["given up"] = True
            files.say_once(f"train.py: a step cannot be captured as a CUDA graph ({files.reason(error)}); it goes on "
                           "without, slower. --no-cuda-graphs does not try")
            return function(size)
    graphs[name, size]()


def record(function, graphs):
    """Captures function() in a CUDA graph, computing nothing; returns what replays it.

    The graphs of a run share memory: they are replayed one after the other, and nothing that one leaves there is read
    once another has begun. That of graphs which are gone would come back only by emptying the cache, for which the
    whole device is waited for, as torch.cuda.graph does: so the last graph stays until the next shares its memory.
    """
    graph, pool = torch.cuda.CUDAGraph(), [graphs["last"].pool()] if "last" in graphs else []
    wait_for(torch.cuda.current_stream())
    graph.capture_begin(*pool, capture_error_mode="thread_local")
    try:
        function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # what went wrong has been raised already
            graph.capture_end()
        raise
    graph.capture_end()
    graphs["last"] = graph
    return graph.replay


def wait_for(stream):
    """Waits until a CUDA stream has done its work, and hears signals meanwhile: PyTorch's own waits would be deaf to
    SIGTERM until all that is queued is done."""
    done = stream.record_event()
    while not done.query():
        time.sleep(0.0005)


def numbers(tensor):
    """tensor.tolist(), for which wait_for waits."""
    if tensor.is_cuda:
        wait_for(torch.cuda.current_stream())
    return tensor.tolist()


def stream_of(device):
    """A CUDA stream of its own to work on (of STREAMS that PyTorch has, in turn); on a CPU, nothing."""
    return torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None)
