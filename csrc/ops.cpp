// The operators' schemas, and masked_conv2d: the convolution of the live filters, by the vendor
// library, by cpu/winograd.cpp or by cpu/products.cpp. bn_act and ebn_score are in operators.h,
// their kernels in cpu/ and cuda/; fake kernels, autograd and references in plain PyTorch in
// gst_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>
#include <Python.h>

#include <atomic>
#include <cstring>

#include "cpu/products.h"
#include "cpu/winograd.h"
#include "operators.h"

// The operators are found through torch.ops.gst: importing the module only loads them.
extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
  return PyModule_Create(&module);
}

namespace gst {

void check_conv(const Tensor& x, const Tensor& weight, const OptTensor& bias,
    const OptTensor& live_out, const OptTensor& live_in, int64_t stride, int64_t padding) {
  const char* op = "masked_conv2d";
  TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, op,
      ": x and weight must have four dimensions, not ", x.sizes(), " and ", weight.sizes());
  const auto type = x.scalar_type();
  const int64_t c_in = x.size(1), kh = weight.size(2), kw = weight.size(3);
  TORCH_CHECK(at::isFloatingType(type), op, ": x must be of a floating type, not ", type);
  checked(op, "live_out", contiguous(live_out), {live_out ? live_out->numel() : 0}, at::kLong, x);
  checked(op, "live_in", contiguous(live_in), {c_in}, at::kLong, x);
  const int64_t all_in = live_in ? weight.size(1) : c_in;
  checked(op, "weight", weight, {weight.size(0), all_in, kh, kw}, type, x);
  checked(op, "bias", bias, {weight.size(0)}, type, x);
  TORCH_CHECK(stride >= 1 && padding >= 0, op, ": stride must be at least 1, padding at least 0");
  TORCH_CHECK(x.size(2) + 2 * padding >= kh && x.size(3) + 2 * padding >= kw, op,
      ": the kernel is larger than the padded map");
}

Tensor live_part(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in) {
  Tensor part = live_out ? weight.index_select(0, *live_out) : weight;
  if (live_in) part = part.index_select(1, *live_in);
  return part.contiguous(weight.suggest_memory_format());
}

// The part's values in a tensor like `whole`, zeros elsewhere.
Tensor scattered(
    const Tensor& part, const Tensor& whole, const OptTensor& live_out, const OptTensor& live_in) {
  if (!live_out && !live_in) return part;
  Tensor rows = part;
  if (live_in) {
    std::vector<int64_t> sizes = whole.sizes().vec();
    sizes[0] = part.size(0);
    rows = at::zeros(sizes, part.options().memory_format(whole.suggest_memory_format()));
    rows.index_copy_(1, *live_in, part);
  }
  return live_out ? at::zeros_like(whole).index_copy_(0, *live_out, rows) : rows;
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias,
    const OptTensor& live_out, const OptTensor& live_in, int64_t stride, int64_t padding) {
  check_conv(x, weight, bias, live_out, live_in, stride, padding);
  const int64_t c_out = live_out ? live_out->size(0) : weight.size(0);
  const OptTensor live_bias = bias && live_out ? OptTensor(bias->index_select(0, *live_out)) : bias;
  if (winograd_pays(x, weight, c_out, stride, padding)) {
    const Tensor filters = winograd_filters(weight, live_out, live_in, x.size(2), x.size(3), false);
    return winograd_conv2d(x, filters, c_out, live_bias, {}, false);
  }
  const Tensor w = live_part(weight, live_out, live_in);
  const auto size = [&](int dim) { return (x.size(dim) + 2 * padding - w.size(dim)) / stride + 1; };
  const auto with_bias = [&](const Tensor& y) {
    return live_bias ? y.add_(live_bias->view({1, -1, 1, 1})) : y;
  };
  if (w.size(0) == 0 || w.size(1) == 0)  // the libraries refuse convolutions of nothing
    return with_bias(at::zeros({x.size(0), w.size(0), size(2), size(3)}, x.options()));
  if (products_pay(x, w, {size(2), size(3)}, false))
    return with_bias(convolve_by_products(x, w, stride, padding, false));
  return at::convolution(
      x, w, live_bias, {stride, stride}, {padding, padding}, {1, 1}, false, {0, 0}, 1);
}

// The weight gradient of a stride-1 convolution is itself a convolution, of x by grad with batch
// and channels swapped. On the CPU's smallest maps the library is up to twice as fast at that as at
// its own weight gradient.
Tensor weight_gradient_as_convolution(const Tensor& grad, const Tensor& x, int64_t padding) {
  const auto format = x.size(2) <= 2 ? at::MemoryFormat::Contiguous : kChannelsLast;
  return at::convolution(x.transpose(0, 1).contiguous(format),
      grad.transpose(0, 1).contiguous(format), {}, {1, 1}, {padding, padding}, {1, 1}, false,
      {0, 0}, 1)
      .transpose(0, 1);
}

// Every stride-th pixel: what 1x1 filters read.
Tensor strided(const Tensor& x, int64_t stride) {
  return x.slice(2, 0, x.size(2), stride).slice(3, 0, x.size(3), stride);
}

std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward(const Tensor& grad, const Tensor& x,
    const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in, int64_t stride,
    int64_t padding, std::array<bool, 3> need) {
  check_conv(x, weight, std::nullopt, live_out, live_in, stride, padding);
  Tensor dx = at::empty({0}, x.options()), dw = dx, db = dx;  // where none is needed
  const int64_t c_out = live_out ? live_out->size(0) : weight.size(0);
  if (winograd_pays(x, weight, c_out, stride, padding)) {
    if (need[0]) {
      const Tensor filters =
          winograd_filters(weight, live_out, live_in, x.size(2), x.size(3), true);
      dx = winograd_conv2d(grad, filters, x.size(1), {}, {}, false);
    }
    if (need[1]) dw = winograd_weight_gradient(grad, x, weight, live_out, live_in);
    if (need[2]) db = grad.sum({0, 2, 3});
  } else {
    const Tensor w = live_part(weight, live_out, live_in);
    if (w.size(0) == 0 || w.size(1) == 0 || x.numel() == 0) {
      dx = at::zeros_like(x);
      dw = at::zeros_like(w);
      db = grad.sum({0, 2, 3});
    } else {
      const bool swap = need[1] && x.is_cpu() && stride == 1 && w.size(2) > 1 && x.size(2) <= 4 &&
          x.size(3) <= 4 && x.size(2) == grad.size(2) && x.scalar_type() == at::kFloat &&
          x.size(0) >= 32;
      // A guard against memory that the library overwrites (oneDNN of PyTorch 2.14): these filters
      // are given the pixels that they read, without a stride.
      const bool skip =
          x.is_cpu() && stride > 1 && padding == 0 && w.size(2) == 1 && w.size(3) == 1;
      const Tensor read = skip ? strided(x, stride).contiguous(x.suggest_memory_format()) : x;
      const int64_t step = skip ? 1 : stride;
      const at::IntArrayRef size = grad.sizes().slice(2);
      const bool product = need[1] && products_pay(x, w, size, true),
                 dx_product = need[0] && stride == 1 && products_pay(x, w, size, false);
      // The library computes the weights' gradient too wherever it is asked for the bias's.
      const bool own = swap || product;
      const std::array<bool, 3> mask = {
          need[0] && !dx_product, need[1] && !own, need[2] && !own};
      const auto bias_size =
          need[2] ? at::OptionalIntArrayRef(w.sizes().slice(0, 1)) : std::nullopt;
      if (mask[0] || mask[1] || mask[2])
        std::tie(dx, dw, db) = at::convolution_backward(grad, read, w, bias_size, {step, step},
            {padding, padding}, {1, 1}, false, {0, 0}, 1, mask);
      if (dx_product) dx = convolve_by_products(grad, w, 1, padding, true);
      if (product) dw = weight_gradient_by_products(grad, x, w, stride, padding);
      else if (swap)
        dw = weight_gradient_as_convolution(grad, x, padding)
                 .contiguous(weight.suggest_memory_format());
      if (need[2] && !mask[2]) db = grad.sum({0, 2, 3});
      if (skip && need[0]) {
        const Tensor whole = at::zeros_like(x);
        strided(whole, stride).copy_(dx);
        dx = whole;
      }
    }
    if (need[1]) dw = scattered(dw, weight, live_out, live_in);
  }
  if (need[2] && live_out)
    db = at::zeros({weight.size(0)}, db.options()).index_copy_(0, *live_out, db);
  // cuDNN's float64 gradients are not channels-last where their tensors are.
  const auto wanted = [&](int i, const Tensor& t, at::MemoryFormat format) {
    return need[i] ? t.contiguous(format) : at::empty({0}, x.options());
  };
  return {wanted(0, dx, x.suggest_memory_format()), wanted(1, dw, weight.suggest_memory_format()),
      wanted(2, db, at::MemoryFormat::Contiguous)};
}

// Whether two CPU tensors hold the same bits, by all threads, at the speed of memory (at::equal
// takes one thread).
bool same_bits(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.is_cpu() && b.is_cpu(), "same_bits: both tensors must be on the CPU");
  TORCH_CHECK(a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense(),
      "same_bits: tensors with gaps");
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() || a.strides() != b.strides())
    return false;
  const char *p = static_cast<const char*>(a.const_data_ptr()),
             *q = static_cast<const char*>(b.const_data_ptr());
  std::atomic<bool> same = true;
  at::parallel_for(0, static_cast<int64_t>(a.nbytes()), 1 << 18, [&](int64_t begin, int64_t end) {
    if (std::memcmp(p + begin, q + begin, end - begin)) same = false;
  });
  return same;
}

}  // namespace gst

// A schema tells the dispatcher an operator's types and, as (a!), what it writes to.
TORCH_LIBRARY(gst, m) {
  m.def("ebn_score(Tensor gamma, Tensor beta, bool signed=False) -> Tensor");
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? live_out, Tensor? live_in, "
      "int stride, int padding) -> Tensor");
  // dx, dweight and dbias, empty where not needed.
  m.def(
      "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? live_out, "
      "Tensor? live_in, int stride, int padding, bool[3] need) -> (Tensor, Tensor, Tensor)");
  // out, mean and invstd (c,), c the live filters, and relu_bits, whose order is the kernels' own.
  // bias (c_out,), in training: what the convolution left out of x, for the running mean alone.
  m.def(
      "bn_act(Tensor x, Tensor gamma, Tensor beta, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor? live, Tensor? residual, Tensor? residual_map, "
      "Tensor(c!)? act, bool training, bool relu, bool pool, float momentum, float eps, "
      "float ema_decay, Tensor? bias=None) -> (Tensor, Tensor, Tensor, Tensor)");
  // dx, dgamma and dbeta (c_out,), dresidual (n, residual_channels, h, w), empty if those are < 0.
  m.def(
      "bn_act_backward(Tensor grad, Tensor x, Tensor relu_bits, Tensor gamma, Tensor mean, "
      "Tensor invstd, Tensor? live, Tensor? residual_map, int residual_channels, bool training, "
      "bool pool) -> (Tensor, Tensor, Tensor, Tensor)");
  // What evaluation by folded weights and the tests call directly, on the CPU.
  m.def("same_bits", gst::same_bits);
  m.def("winograd_pays", gst::winograd_pays);
  m.def("winograd_filters", gst::winograd_filters);
  m.def("winograd_conv2d", gst::winograd_conv2d);
  m.def("winograd_weight_gradient", gst::winograd_weight_gradient);
}

// What computes on the CPU; ebn_score and bn_act are in cpu/bn_act.cpp.
TORCH_LIBRARY_IMPL(gst, CPU, m) {
  m.impl("masked_conv2d", gst::masked_conv2d);
  m.impl("masked_conv2d_backward", gst::masked_conv2d_backward);
}

// On a GPU the convolution is the vendor library's; the others are in cuda/ops_cuda.cpp.
TORCH_LIBRARY_IMPL(gst, CUDA, m) {
  m.impl("masked_conv2d", gst::masked_conv2d);
  m.impl("masked_conv2d_backward", gst::masked_conv2d_backward);
}
