// The PyTorch side of ebn_score and bn_act, the same for the CPU and for CUDA: what is checked, how
// the memory lies, what is allocated. A Kernels class is made from a tensor of the device, computes
// there with ebn_score(...) and run(...), and tells relu_bits_bytes(...): see cpu/bn_act.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "kernels.h"

namespace gst {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

// The address of t's values, null without t, if it fits x. The values of indices are not looked at:
// that would stop a GPU.
inline void* checked(const char* op, const char* name, const OptTensor& t, at::IntArrayRef sizes,
    at::ScalarType type, const Tensor& x) {
  if (!t) return nullptr;
  TORCH_CHECK(t->sizes() == sizes && t->scalar_type() == type && t->device() == x.device() &&
          (t->dim() > 1 || t->is_contiguous()),
      op, ": ", name, " must be ", type, " ", sizes, " on ", x.device(),
      ", contiguous if a vector, not ", t->scalar_type(), " ", t->sizes(), " on ", t->device());
  return t->data_ptr();
}

// The channels of `live`, all if null.
inline std::vector<int64_t> live_channels(const int64_t* live, int64_t count, int64_t all) {
  std::vector<int64_t> channels(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = channels[i] = live ? live[i] : i;
    TORCH_CHECK_INDEX(channel >= 0 && channel < all, "live channel ", channel, " of ", all);
  }
  return channels;
}

inline OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(t->contiguous()) : t; }

// 16 bytes are read at once, so a part of another tensor is copied if it begins elsewhere.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 32 ? t.clone() : t;
}

inline OptTensor channels_last(const char* op, const OptTensor& map) {
  if (!map) return map;
  TORCH_CHECK(map->dim() == 4, op, ": maps must have four dimensions, not ", map->sizes());
  return aligned(map->contiguous(kChannelsLast));
}

inline Tensor empty_map(const Tensor& like, int64_t c, int64_t step) {
  return at::empty({like.size(0), c, like.size(2) / step, like.size(3) / step},
      like.options().memory_format(kChannelsLast));
}

template <typename Kernels>
Tensor ebn_score(const Tensor& gamma, const Tensor& beta, bool is_signed) {
  const auto type = gamma.scalar_type();
  TORCH_CHECK(at::isFloatingType(type), "ebn_score: gamma must be of a floating type, not ", type);
  Tensor g = gamma.contiguous(), b = beta.contiguous();
  checked("ebn_score", "gamma", g, {g.numel()}, type, gamma);
  checked("ebn_score", "beta", b, {g.numel()}, type, gamma);
  g = g.to(at::kDouble);
  b = b.to(at::kDouble);
  const Tensor score = at::empty_like(g);
  Kernels(gamma).ebn_score(g.const_data_ptr<double>(), b.const_data_ptr<double>(),
      score.data_ptr<double>(), g.numel(), is_signed);
  return score.to(type);
}

// What both passes get alike, checked.
inline BnAct common_arguments(const char* op, const Tensor& x, const Tensor& gamma,
    const OptTensor& live, int64_t residual_channels, const OptTensor& residual_map, bool training,
    bool pool) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op,
      ": no kernel for ", type);
  TORCH_CHECK(!residual_map || residual_channels >= 0, op, ": residual_map needs a residual");
  TORCH_CHECK(!pool || (residual_channels < 0 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0), op,
      ": pool needs maps of even size and no residual, not x ", x.sizes());
  // Windows are numbered in 32 bits.
  TORCH_CHECK(!pool || !x.is_cuda() || x.numel() < int64_t{1} << 34, op,
      ": on a GPU pool needs maps of less than 2^34 values, not x ", x.sizes());
  BnAct p = {};
  p.type = type == at::kDouble ? Type::kDouble : Type::kFloat;
  if (type == at::kBFloat16) p.type = Type::kBFloat16;
  p.rows = x.size(0) * x.size(2) * x.size(3);
  p.c = x.size(1);
  p.c_out = live ? gamma.numel() : p.c;
  p.live = as<int64_t>(checked(op, "live", live, {p.c}, at::kLong, x));
  p.x = x.const_data_ptr();
  p.residual_channels = residual_channels;
  p.residual_map = as<int64_t>(checked(op, "residual_map", residual_map, {p.c}, at::kLong, x));
  p.gamma = checked(op, "gamma", gamma, {p.c_out}, type == at::kDouble ? type : at::kFloat, x);
  p.training = training;
  p.pool_width = pool ? x.size(3) : 0;
  return p;
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act(const Tensor& x_in, const Tensor& gamma,
    const Tensor& beta, const Tensor& running_mean, const Tensor& running_var,
    const OptTensor& live_in, const OptTensor& residual_in, const OptTensor& residual_map_in,
    const OptTensor& act, bool training, bool relu, bool pool, double momentum, double eps,
    double ema_decay, const OptTensor& bias) {
  const char* op = "bn_act";
  const Kernels kernels(x_in);
  const Tensor x = *channels_last(op, x_in);
  const OptTensor residual = channels_last(op, residual_in);
  const OptTensor live = contiguous(live_in), residual_map = contiguous(residual_map_in);
  const int64_t residual_channels = residual ? residual->size(1) : -1;
  BnAct p = common_arguments(op, x, gamma, live, residual_channels, residual_map, training, pool);
  TORCH_CHECK(!training || p.rows > 1, op,
      ": training needs more than one value per channel, x is ", x.sizes());
  const auto vector = [&](const char* name, const OptTensor& t) {
    return checked(op, name, t, {p.c_out}, gamma.scalar_type(), x);
  };
  p.beta = vector("beta", beta);
  p.running_mean = vector("running_mean", running_mean);
  p.running_var = vector("running_var", running_var);
  p.bias = vector("bias", bias);
  p.act = as<float>(checked(op, "act", act, {p.c_out}, at::kFloat, x));
  p.residual = checked(op, "residual", residual,
      {x.size(0), residual_map ? residual_channels : p.c, x.size(2), x.size(3)}, x.scalar_type(),
      x);
  p.relu = relu;
  p.momentum = momentum;
  p.eps = eps;
  p.ema_decay = ema_decay;

  const Tensor out = empty_map(x, p.c, pool ? 2 : 1);
  const Tensor mean = at::empty({p.c}, gamma.options()), invstd = at::empty_like(mean);
  const int64_t bytes = kernels.relu_bits_bytes(p.type, p.rows, p.c);
  const Tensor relu_bits = at::empty({bytes}, x.options().dtype(at::kByte));
  p.out = out.data_ptr();
  p.mean = mean.data_ptr();
  p.invstd = invstd.data_ptr();
  p.relu_bits = relu_bits.data_ptr();
  kernels.run(p, false, gamma.options());
  return {out, mean, invstd, relu_bits};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_in,
    const Tensor& x_in, const Tensor& relu_bits, const Tensor& gamma, const Tensor& mean_in,
    const Tensor& invstd, const OptTensor& live_in, const OptTensor& residual_map_in,
    int64_t residual_channels, bool training, bool pool) {
  const char* op = "bn_act_backward";
  const Kernels kernels(x_in);
  const Tensor grad = *channels_last(op, grad_in), x = *channels_last(op, x_in);
  const Tensor mean = aligned(mean_in);
  const OptTensor live = contiguous(live_in), residual_map = contiguous(residual_map_in);
  BnAct p = common_arguments(op, x, gamma, live, residual_channels, residual_map, training, pool);
  const int64_t step = pool ? 2 : 1, bytes = kernels.relu_bits_bytes(p.type, p.rows, p.c);
  p.grad = checked(
      op, "grad", grad, {x.size(0), p.c, x.size(2) / step, x.size(3) / step}, x.scalar_type(), x);
  p.mean = checked(op, "mean", mean, {p.c}, gamma.scalar_type(), x);
  p.invstd = checked(op, "invstd", invstd, {p.c}, gamma.scalar_type(), x);
  p.relu_bits = checked(op, "relu_bits", relu_bits, {bytes}, at::kByte, x);

  const Tensor dx = empty_map(x, p.c, 1);
  const Tensor dgamma = at::empty_like(gamma), dbeta = at::empty_like(gamma);
  Tensor dresidual = at::empty({0}, x.options());
  if (residual_channels >= 0) dresidual = empty_map(x, residual_channels, 1);
  if (residual_map) dresidual.zero_();
  p.dx = dx.data_ptr();
  p.dgamma = dgamma.data_ptr();
  p.dbeta = dbeta.data_ptr();
  p.dresidual = residual_channels >= 0 ? dresidual.data_ptr() : nullptr;
  kernels.run(p, true, gamma.options());
  return {dx, dgamma, dbeta, dresidual};
}

}  // namespace gst
