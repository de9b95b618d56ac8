// Checks that the CPU and the CUDA side of an operator share.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace gst {

inline void check_ebn_score(const at::Tensor& gamma, const at::Tensor& beta) {
  TORCH_CHECK(gamma.dim() == 1 && beta.sizes() == gamma.sizes(),
              "ebn_score: gamma and beta must be vectors of one length, not ", gamma.sizes(), " and ", beta.sizes());
  TORCH_CHECK(at::isFloatingType(gamma.scalar_type()) && beta.scalar_type() == gamma.scalar_type(),
              "ebn_score: gamma and beta must be of one floating type, not ", gamma.scalar_type(), " and ",
              beta.scalar_type());
  TORCH_CHECK(beta.device() == gamma.device(), "ebn_score: gamma is on ", gamma.device(), " and beta on ",
              beta.device());
}

// An index vector: int64, one-dimensional, on x's device. Its values are not read: that would stop the GPU.
inline void check_index(const char* op, const char* name, const std::optional<at::Tensor>& index, const at::Tensor& x) {
  if (!index) return;
  TORCH_CHECK(index->dim() == 1 && index->scalar_type() == at::kLong && index->device() == x.device(), op, ": ", name,
              " must be an int64 vector on ", x.device(), ", not ", index->scalar_type(), " ", index->sizes(), " on ",
              index->device());
}

inline void check_vector(const char* op, const char* name, const at::Tensor& v, int64_t length, at::ScalarType type,
                         const at::Tensor& x) {
  TORCH_CHECK(v.dim() == 1 && v.size(0) == length && v.scalar_type() == type && v.device() == x.device() &&
              v.is_contiguous(), op, ": ", name, " must be a contiguous ", type, " vector of ", length, " on ",
              x.device(), ", not ", v.scalar_type(), " ", v.sizes(), " on ", v.device());
}

inline void check_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& live_out, const std::optional<at::Tensor>& live_in,
                       int64_t stride, int64_t padding) {
  const char* op = "masked_conv2d";
  TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, op, ": x and weight must have four dimensions, not ", x.sizes(),
              " and ", weight.sizes());
  TORCH_CHECK(at::isFloatingType(x.scalar_type()) && weight.scalar_type() == x.scalar_type(), op,
              ": x and weight must be of one floating type, not ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK(weight.device() == x.device(), op, ": x is on ", x.device(), " and weight on ", weight.device());
  check_index(op, "live_out", live_out, x);
  check_index(op, "live_in", live_in, x);
  const int64_t c_in = live_in ? live_in->size(0) : weight.size(1);
  TORCH_CHECK(x.size(1) == c_in, op, ": x has ", x.size(1), " channels, but the weight's live input has ", c_in);
  TORCH_CHECK(stride >= 1 && padding >= 0, op, ": stride must be at least 1 and padding at least 0");
  TORCH_CHECK(x.size(2) + 2 * padding >= weight.size(2) && x.size(3) + 2 * padding >= weight.size(3), op,
              ": the kernel is larger than the padded map");
  if (bias) check_vector(op, "bias", *bias, weight.size(0), x.scalar_type(), x);
}

// What bn_act and its backward pass have in common: the map, the scale, the live filters, the shortcut's map.
inline void check_bn(const char* op, const at::Tensor& x, const at::Tensor& gamma,
                     const std::optional<at::Tensor>& live, const std::optional<at::Tensor>& residual_map) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.dim() == 4, op, ": x must have four dimensions, not ", x.sizes());
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || (type == at::kHalf && x.is_cuda()),
              op, ": no kernel for ", type, " on ", x.device());
  check_index(op, "live", live, x);
  check_index(op, "residual_map", residual_map, x);
  TORCH_CHECK(gamma.dim() == 1 && x.size(1) == (live ? live->size(0) : gamma.size(0)), op, ": x has ", x.size(1),
              " channels, but there are ", live ? live->size(0) : gamma.numel(), " live filters");
  TORCH_CHECK(!residual_map || residual_map->size(0) == x.size(1), op, ": residual_map must have one entry a channel");
}

// Parameters and statistics are float32 beside a narrower x, and of x's type otherwise.
inline at::ScalarType bn_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_pool(const char* op, const at::Tensor& x, bool residual, bool pool) {
  TORCH_CHECK(!pool || (!residual && x.size(2) % 2 == 0 && x.size(3) % 2 == 0), op,
              ": pool is of maps of even size, without a residual, not of x ", x.sizes());
  TORCH_CHECK(!pool || !x.is_cuda() || x.numel() < int64_t{1} << 34, op,  // windows are numbered in 32 bits
              ": on a GPU pool is of maps of less than 2^34 values, not of x ", x.sizes());
}

inline void check_bn_act(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta,
                         const at::Tensor& running_mean, const at::Tensor& running_var,
                         const std::optional<at::Tensor>& live, const std::optional<at::Tensor>& residual,
                         const std::optional<at::Tensor>& residual_map, const std::optional<at::Tensor>& act,
                         const std::optional<at::Tensor>& measure, bool training, bool pool,
                         const std::optional<at::Tensor>& bias) {
  const char* op = "bn_act";
  check_bn(op, x, gamma, live, residual_map);
  const int64_t c_out = gamma.size(0);
  check_vector(op, "gamma", gamma, c_out, bn_type(x), x);
  check_vector(op, "beta", beta, c_out, bn_type(x), x);
  check_vector(op, "running_mean", running_mean, c_out, bn_type(x), x);
  check_vector(op, "running_var", running_var, c_out, bn_type(x), x);
  if (act) check_vector(op, "act", *act, c_out, at::kFloat, x);
  if (bias) check_vector(op, "bias", *bias, c_out, bn_type(x), x);
  TORCH_CHECK(!measure || (act && measure->numel() == 1 && measure->scalar_type() == at::kBool &&
              measure->device() == x.device()), op, ": measure must be one bool on ", x.device(), ", with an act");
  TORCH_CHECK(!residual_map || residual, op, ": residual_map needs a residual");
  if (residual)
    TORCH_CHECK(residual->dim() == 4 && residual->scalar_type() == x.scalar_type() &&
                residual->device() == x.device() && residual->size(0) == x.size(0) &&
                residual->size(2) == x.size(2) && residual->size(3) == x.size(3) &&
                (residual_map || residual->size(1) == x.size(1)), op, ": residual ", residual->scalar_type(), " ",
                residual->sizes(), " on ", residual->device(), " does not fit x ", x.scalar_type(), " ", x.sizes());
  check_pool(op, x, residual.has_value(), pool);
  TORCH_CHECK(!training || x.size(0) * x.size(2) * x.size(3) > 1, op,
              ": training needs more than one value per channel, x is ", x.sizes());
}

inline void check_like_x(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type() && t.device() == x.device(), op, ": ", name,
              " must be like x, ", x.scalar_type(), " ", x.sizes());
}

inline void check_gate(const at::Tensor& gate, const at::Tensor& x, at::ScalarType type, int64_t length) {
  TORCH_CHECK(gate.device() == x.device() && gate.scalar_type() == type && gate.dim() == 1 && gate.is_contiguous() &&
              gate.size(0) == length, "bn_act_backward: gate is not bn_act's for such an x");
}

inline void check_bn_act_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma,
                                  const at::Tensor& mean, const at::Tensor& invstd,
                                  const std::optional<at::Tensor>& live,
                                  const std::optional<at::Tensor>& residual_map, int64_t residual_channels,
                                  bool pool) {
  const char* op = "bn_act_backward";
  check_bn(op, x, gamma, live, residual_map);
  check_pool(op, x, residual_channels >= 0, pool);
  check_vector(op, "gamma", gamma, gamma.size(0), bn_type(x), x);
  check_vector(op, "mean", mean, x.size(1), bn_type(x), x);
  check_vector(op, "invstd", invstd, x.size(1), bn_type(x), x);
  check_like_x(op, "grad", grad, pool ? x.slice(2, 0, x.size(2) / 2).slice(3, 0, x.size(3) / 2) : x);
}

}  // namespace gst
