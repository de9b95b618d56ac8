// Convolutions in bf16 of small maps on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

namespace gst {

// Whether the functions below are faster than the library for results of this size, height and
// width, if they are at most `most`.
bool products_pay(
    const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef size, int64_t most);

// The convolution of x by all filters of weight; flipped, of stride 1, of a map that they give: its
// gradient for x.
at::Tensor convolve_by_products(
    const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t padding, bool flipped);

// The gradient for weight.
at::Tensor weight_gradient_by_products(const at::Tensor& grad, const at::Tensor& x,
    const at::Tensor& weight, int64_t stride, int64_t padding);

}  // namespace gst
