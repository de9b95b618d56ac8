"""Products with the Hessian of a network's mean cross-entropy, by autograd.

The functions take a torch module in eval mode whose output is logits, images x and int64 labels y.
Vectors are flat, (n,), in the order of model.parameters().
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


def flat(tensors):
    """Concatenates tensors into a vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def weight_scale(model):
    """Returns |w| (n,), the scale of the adaptive forms."""
    return flat(p.detach().abs() for p in model.parameters())


def convolution_gradients(gradient, x, weight, wanted, geometry):
    """Returns the gradients of a convolution's input and weight, None for those not wanted."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *geometry, [*wanted, False])[:2]


class Convolution(torch.autograd.Function):
    """torch.convolution without a bias, with faster second derivatives.

    PyTorch computes them by convolving whole feature maps with each other; the gradient of a
    convolution's weight is the same sum."""

    @staticmethod
    def forward(ctx, x, weight, *geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.convolution(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx, gradient):
        differentiable = torch.is_grad_enabled()
        function = ConvolutionGradients.apply if differentiable else convolution_gradients
        gradients = function(gradient, *ctx.saved_tensors, ctx.needs_input_grad[:2], ctx.geometry)
        return *gradients, *[None] * len(ctx.geometry)


class ConvolutionGradients(torch.autograd.Function):
    """convolution_gradients as a function that can be differentiated once.

    Its results are linear in the gradient, in x and in the weight, so that its derivatives are a
    convolution and convolution_gradients again."""

    @staticmethod
    def forward(ctx, gradient, x, weight, wanted, geometry):
        ctx.save_for_backward(gradient, x, weight)
        ctx.geometry = geometry
        return convolution_gradients(gradient, x, weight, wanted, geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, along_x, along_weight):
        gradient, x, weight = ctx.saved_tensors
        result = torch.convolution(x, along_weight, None, *ctx.geometry)
        if along_x is None:  # x is the images
            return result, None, None, None, None
        result += torch.convolution(along_x, weight, None, *ctx.geometry)
        return result, *convolution_gradients(
            gradient, along_x, along_weight, (True, True), ctx.geometry), None, None


class FastSecondDerivatives(torch.overrides.TorchFunctionMode):
    """Computes convolutions by Convolution, and batch norm as a scale and a shift; raises
    ValueError for functions in training mode. docs/flatness.md has the times."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("training"):
            raise ValueError(f"{function.__name__} is in training mode: call model.eval()")
        if function is torch.conv2d and len(args) == 7 and not isinstance(args[4], str):
            x, weight, bias, stride, padding, dilation, groups = args
            x = Convolution.apply(x, weight, stride, padding, dilation, False, (0, 0), groups)
            return x if bias is None else x + bias.view(-1, 1, 1)
        if function is F.batch_norm and args[1] is not None:
            (x, mean, var), weight, bias = args, kwargs["weight"], kwargs["bias"]
            scale = (var + kwargs["eps"]).rsqrt() * (1 if weight is None else weight)
            shift = (0 if bias is None else bias) - mean * scale
            shape = -1, *[1] * (x.ndim - 2)
            return x * scale.view(shape) + shift.view(shape)
        return function(*args, **kwargs)


def logits_of(model, x):
    """Returns the logits of a network; raises ValueError if it is not ready to be measured."""
    # a forward pass in training mode would change batch norm's counters
    if any(m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)):
        raise ValueError("the network is in training mode: call model.eval()")
    if not all(p.requires_grad for p in model.parameters()):
        raise ValueError("some parameters are frozen: call model.requires_grad_(True)")
    with FastSecondDerivatives():
        return model(x)


def loss_gradient(model, x, y, divisor):
    """Returns the gradient (n,), with its graph, of the summed loss over `divisor`."""
    loss = F.cross_entropy(logits_of(model, x), y, reduction="sum") / divisor
    return flat(torch.autograd.grad(loss, list(model.parameters()), create_graph=True,
                                    materialize_grads=True))


def images_that_fit(model, x, y, memory_gb):
    """Returns for how many images the gradient's graph takes half of memory_gb."""
    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()
    sizes = []
    for images in (1, 2):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_gradient(model, x[:images], y[:images], images)
        sizes.append(sum(held.values()))
    return max(1, int(memory_gb * 2**29 / max(1, sizes[1] - sizes[0])))


def check_second_derivatives(model, x):
    """Raises ValueError unless the product of a small step with the Hessian is the change of the
    gradient, for one image, in float64, where the two agree to 1e-7."""
    twin, x = copy.deepcopy(model).double(), x[:1].double()
    params, y = list(twin.parameters()), logits_of(twin, x).argmin(1)  # so that the loss is not 0
    step = torch.randn(len(flat(params)), generator=torch.Generator().manual_seed(0))
    step = 1e-8 * weight_scale(twin) * step.to(x)
    try:
        before = loss_gradient(twin, x, y, 1)
        product = flat(torch.autograd.grad(before, params, step, materialize_grads=True))
        nn.utils.vector_to_parameters(flat(params).detach() + step, params)
        change = loss_gradient(twin, x, y, 1).detach() - before.detach()
        wrong = (product - change).norm() > 1e-3 * change.norm() + 1e-12 * before.norm()
    except RuntimeError:
        wrong = True
    if wrong:
        raise ValueError("a layer of this network has no second derivative, or a wrong one: use a "
                         "plain PyTorch implementation of that layer")


class HessianOperator:
    """Products with the Hessian H of the mean loss, or with D H D, D = diag(scale).

    The gradient's graph is kept if it fits memory_gb, else built anew in each product, for one part
    of the images after another. `scale` may be replaced; on_product() is called after each product.
    """

    def __init__(self, model, x, y, scale=None, memory_gb=4, on_product=None):
        self.model, self.scale, self.on_product, self.products = model, scale, on_product, 0
        self.params, self.num_images = list(model.parameters()), len(x)
        self.shape = (sum(p.numel() for p in self.params),) * 2
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        size = images_that_fit(model, x, y, memory_gb)
        check_second_derivatives(model, x)
        self.parts = list(zip(x.split(size), y.split(size)))
        self.graph = loss_gradient(model, x, y, len(x)) if size >= len(x) else None

    def matvec(self, v):
        """Returns the product with v (n,)."""
        v = v if self.scale is None else self.scale * v
        result, keep = torch.zeros_like(v), self.graph is not None
        for x, y in self.parts:
            gradient = self.graph if keep else loss_gradient(self.model, x, y, self.num_images)
            result += flat(torch.autograd.grad(gradient, self.params, v, keep,
                                               materialize_grads=True))
        self.products += 1
        if self.on_product:
            self.on_product()
        return result if self.scale is None else self.scale * result
