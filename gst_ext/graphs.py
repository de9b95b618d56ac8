"""A step as a CUDA graph: what a step asks of the host becomes one call.

    graphs = new_graphs(device)  # None where steps are not captured
    for epoch in range(epochs):
        hold_for(graphs, lr, shapes)  # a graph holds fast what was a number or a shape when it was captured
        total, at, order = fed(graphs, "train", total, at, order)
        for _ in range(steps):
            replayed(graphs, "train", step, batch_size)  # step(batch_size) finds its batch by `at`, and moves it on
"""
import torch

GRAPHED = ("cuda",)  # devices whose steps are captured
WARM_UP = 3  # calls of a step before it becomes a graph: the libraries choose their algorithms in them


def new_graphs(device):
    """What keeps a run's graphs on `device`; None where there are none."""
    return {} if device.type in GRAPHED else None


def hold_for(graphs, *facts):
    """Clears the graphs unless `facts`, whatever they hold fast, are those of the last call."""
    if graphs is not None and graphs.get("facts") != facts:
        graphs.clear()
        graphs["facts"] = facts


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
    rate, which a graph holds fast. Without graphs (None) it is called as it is.
    """
    if graphs is None:
        return function(size)
    calls = graphs[name, size, "calls"] = graphs.get((name, size, "calls"), 0) + 1
    if calls <= WARM_UP:
        return function(size)
    if (name, size) not in graphs:
        graphs[name, size] = record(lambda: function(size), graphs)
    graphs[name, size]()


def record(function, graphs):
    """Captures function() in a CUDA graph, computing nothing; returns what replays it.

    The graphs of a run share memory: they are replayed one after the other, and nothing that one leaves there is read
    once another has begun.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, graphs.get("pool"), torch.cuda.current_stream(), capture_error_mode="thread_local"):
        function()
    graphs["pool"] = graph.pool()  # goes with the graphs when they are cleared: a pool without graphs is no pool
    return graph.replay


def stream_of(device):
    """A CUDA stream of its own to work on; on a CPU, nothing."""
    return torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None)
