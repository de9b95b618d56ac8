// The schemas, and masked_conv2d: the convolution of the live filters, by the vendor library or cpu/winograd.cpp.
// Kernels are in cpu/ and cuda/; fake kernels, autograd and pure-PyTorch references in gst_ext/.
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <Python.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/winograd.h"

// The operators are found through torch.ops.gst; importing the module is only what loads them.
extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
  return PyModule_Create(&module);
}

namespace gst {

using at::Tensor;

Tensor live_part(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in) {
  Tensor part = live_out ? weight.index_select(0, *live_out) : weight;
  if (live_in && weight.dim() > 1) part = part.index_select(1, *live_in);
  return part.contiguous(weight.suggest_memory_format());
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& live_out,
                     const OptTensor& live_in, int64_t stride, int64_t padding) {
  check_conv(x, weight, bias, live_out, live_in, stride, padding);
  const int64_t c_out = live_out ? live_out->size(0) : weight.size(0);
  if (winograd_pays(x, weight, c_out, stride, padding)) {
    const Tensor filters = winograd_filters(weight, live_out, live_in, x.size(2), x.size(3), false);
    return winograd_conv2d(x, filters, c_out, bias ? OptTensor(live_part(*bias, live_out, {})) : bias, {}, false);
  }
  const Tensor w = live_part(weight, live_out, live_in);
  const OptTensor b = bias ? OptTensor(live_part(*bias, live_out, std::nullopt)) : std::nullopt;
  if (w.size(0) == 0 || w.size(1) == 0) {  // the libraries refuse convolutions of nothing
    const auto size = [&](int64_t n, int64_t k) { return (n + 2 * padding - k) / stride + 1; };
    Tensor y = at::zeros({x.size(0), w.size(0), size(x.size(2), w.size(2)), size(x.size(3), w.size(3))}, x.options());
    return b ? y.add_(b->view({1, -1, 1, 1})) : y;
  }
  return at::convolution(x, w, b, {stride, stride}, {padding, padding}, {1, 1}, false, {0, 0}, 1);
}

// The weight gradient of a stride-1 convolution is itself a convolution, of x by grad with batch and channels swapped.
// On the CPU's smallest maps the library is up to twice as fast at that as at its own weight gradient.
Tensor weight_gradient_as_convolution(const Tensor& grad, const Tensor& x, int64_t padding) {
  const auto format = x.size(2) <= 2 ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  return at::convolution(x.transpose(0, 1).contiguous(format), grad.transpose(0, 1).contiguous(format), {}, {1, 1},
                         {padding, padding}, {1, 1}, false, {0, 0}, 1).transpose(0, 1);
}

// Every stride-th pixel: what 1x1 filters see.
Tensor every(const Tensor& x, int64_t stride) {
  return x.slice(2, 0, x.size(2), stride).slice(3, 0, x.size(3), stride);
}

Tensor scattered(const Tensor& part, const Tensor& like, const OptTensor& live_out, const OptTensor& live_in) {
  if (!live_out && !live_in) return part;
  Tensor rows = part;
  if (live_in && like.dim() > 1) {
    std::vector<int64_t> sizes = like.sizes().vec();
    sizes[0] = part.size(0);
    rows = at::zeros(sizes, part.options().memory_format(like.suggest_memory_format()));
    rows.index_copy_(1, *live_in, part);
  }
  return live_out ? at::zeros_like(like).index_copy_(0, *live_out, rows) : rows;
}

std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool has_bias, const OptTensor& live_out,
    const OptTensor& live_in, int64_t stride, int64_t padding, std::array<bool, 3> need) {
  check_conv(x, weight, std::nullopt, live_out, live_in, stride, padding);
  need[2] = need[2] && has_bias;
  const auto none = [&] { return at::empty({0}, x.options()); };
  const auto whole_bias = [&](const Tensor& db) {
    return live_out ? at::zeros({weight.size(0)}, db.options()).index_copy_(0, *live_out, db) : db;
  };
  const int64_t c_out = live_out ? live_out->size(0) : weight.size(0);
  if (winograd_pays(x, weight, c_out, stride, padding)) {
    const auto dx = [&] {
      const Tensor filters = winograd_filters(weight, live_out, live_in, x.size(2), x.size(3), true);
      return winograd_conv2d(grad, filters, x.size(1), {}, {}, false);
    };
    return {need[0] ? dx() : none(),
            need[1] ? winograd_weight_gradient(grad, x, weight, live_out, live_in) : none(),
            need[2] ? whole_bias(grad.sum({0, 2, 3})) : none()};
  }
  const Tensor w = live_part(weight, live_out, live_in);
  Tensor dx, dw, db;
  if (w.size(0) == 0 || w.size(1) == 0 || x.numel() == 0) {
    dx = at::zeros_like(x);
    dw = at::zeros_like(w);
    db = grad.sum({0, 2, 3});
  } else {
    const bool swap = need[1] && x.is_cpu() && stride == 1 && x.size(2) <= 4 && x.size(3) <= 4 &&
                      x.size(2) == grad.size(2) && x.scalar_type() == at::kFloat && x.size(0) >= 32;
    if (swap) dw = weight_gradient_as_convolution(grad, x, padding).contiguous(weight.suggest_memory_format());
    // For 1x1 filters with a stride and fewer than 8 channels, the library writes past its own memory (oneDNN of
    // PyTorch 2.14, channels-last, AVX2): such filters are given the pixels that they see, without a stride.
    const bool skip = x.is_cpu() && stride > 1 && padding == 0 && w.size(2) == 1 && w.size(3) == 1;
    const Tensor seen = skip ? every(x, stride).contiguous(x.suggest_memory_format()) : x;
    const int64_t step = skip ? 1 : stride;
    // The library computes the weights' gradient too wherever it is asked for the bias's.
    const std::array<bool, 3> mask = {need[0], need[1] && !swap, need[2] && !swap};
    const auto [gx, gw, gb] = at::convolution_backward(
        grad, seen, w, has_bias ? at::OptionalIntArrayRef(w.sizes().slice(0, 1)) : at::OptionalIntArrayRef(),
        {step, step}, {padding, padding}, {1, 1}, false, {0, 0}, 1, mask);
    if (swap && need[2]) db = grad.sum({0, 2, 3});
    else db = gb;
    dx = skip && need[0] ? at::zeros_like(x) : gx;
    if (skip && need[0]) every(dx, stride).copy_(gx);
    if (!swap) dw = gw;
  }
  return {need[0] ? dx : none(), need[1] ? scattered(dw, weight, live_out, live_in) : none(),
          need[2] ? whole_bias(db) : none()};
}

}  // namespace gst

TORCH_LIBRARY(gst, m) {
  m.def("ebn_score(Tensor gamma, Tensor beta, bool signed=False) -> Tensor");
  m.def("same_bits(Tensor a, Tensor b) -> bool");
  m.def("masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? live_out, Tensor? live_in, int stride, "
        "int padding) -> Tensor");
  m.def("masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, bool has_bias, Tensor? live_out, "
        "Tensor? live_in, int stride, int padding, bool[3] need) -> (Tensor, Tensor, Tensor)");
  // The parts of masked_conv2d for filters that are transformed once: cpu/winograd.h.
  m.def("winograd_pays(Tensor x, Tensor weight, int c_out, int stride, int padding) -> bool");
  m.def("winograd_filters(Tensor weight, Tensor? live_out, Tensor? live_in, int h, int w, bool flipped) -> Tensor");
  m.def("winograd_conv2d(Tensor x, Tensor filters, int c, Tensor? bias, Tensor? residual, bool relu) -> Tensor");
  m.def("winograd_weight_gradient(Tensor grad, Tensor x, Tensor weight, Tensor? live_out, Tensor? live_in) -> Tensor");
  // out (n, c, h, w), mean and invstd (c,), c the live filters, and a gate: a bit for each value, set where ReLU (and
  // pool, a max-pool of 2x2) let it through, in an order of the kernels' own. running_mean, running_var and act
  // (c_out,) in place. bias (c_out,), in training: what the convolution has left out of x, which changes nothing but
  // the running mean.
  m.def("bn_act(Tensor x, Tensor gamma, Tensor beta, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor? live, "
        "Tensor? residual, Tensor? residual_map, Tensor(c!)? act, Tensor? measure, bool training, bool relu, "
        "bool pool, float momentum, float eps, float act_keep, Tensor? bias=None) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  // dx, dgamma and dbeta (c_out,), dresidual (n, residual_channels, h, w); residual_channels < 0: there was none.
  m.def("bn_act_backward(Tensor grad, Tensor x, Tensor gate, Tensor gamma, Tensor mean, Tensor invstd, Tensor? live, "
        "Tensor? residual_map, int residual_channels, bool training, bool relu, bool pool) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gst, CPU, m) {
  m.impl("masked_conv2d", gst::masked_conv2d);
  m.impl("masked_conv2d_backward", gst::masked_conv2d_backward);
  m.impl("winograd_pays", gst::winograd_pays);
  m.impl("winograd_filters", gst::winograd_filters);
  m.impl("winograd_conv2d", gst::winograd_conv2d);
  m.impl("winograd_weight_gradient", gst::winograd_weight_gradient);
}

TORCH_LIBRARY_IMPL(gst, CUDA, m) {
  m.impl("masked_conv2d", gst::masked_conv2d);
  m.impl("masked_conv2d_backward", gst::masked_conv2d_backward);
}
