// Convolutions in bf16 of small maps on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

namespace gst {

// Whether the functions below are faster than the library where results have this height and width.
bool products_pay(
    const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef size, bool weight_gradient);

// The convolution of x by all filters of weight; flipped, of stride 1, of a map that they give: its
// gradient for x.
at::Tensor convolve_by_products(
    const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t padding, bool flipped);

// The gradient for weight.
at::Tensor weight_gradient_by_products(const at::Tensor& grad, const at::Tensor& x,
    const at::Tensor& weight, int64_t stride, int64_t padding);

}  // namespace gst
