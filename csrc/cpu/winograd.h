// 3x3 convolutions on the CPU with fewer multiplications.
#pragma once
#include <ATen/core/Tensor.h>

namespace gst {

using OptTensor = std::optional<at::Tensor>;

// Whether the functions below apply and are faster than the library; c_out of the weight's filters
// are live.
bool winograd_pays(
    const at::Tensor& x, const at::Tensor& weight, int64_t c_out, int64_t stride, int64_t padding);

// The transformed filters (panels, points, depth, 32) of weight (c_out, c_in, 3, 3) for maps of h x
// w; flipped, those of the gradient for x.
at::Tensor winograd_filters(const at::Tensor& weight, const OptTensor& live_out,
    const OptTensor& live_in, int64_t h, int64_t w, bool flipped);

// The convolution of x by c filters with padding 1, plus bias (c,) and residual, then ReLU if
// wanted.
at::Tensor winograd_conv2d(const at::Tensor& x, const at::Tensor& filters, int64_t c,
    const OptTensor& bias, const OptTensor& residual, bool relu);

// The gradient for the whole weight, zeros where it is not live.
at::Tensor winograd_weight_gradient(const at::Tensor& grad, const at::Tensor& x,
    const at::Tensor& weight, const OptTensor& live_out, const OptTensor& live_in);

}  // namespace gst
