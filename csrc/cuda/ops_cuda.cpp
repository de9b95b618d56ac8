// The CUDA side of the operators: checks, device guard, current stream, launch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "bn_act.h"
#include "ebn_score.h"

namespace gst {

at::Tensor ebn_score_cuda(const at::Tensor& gamma_in, const at::Tensor& beta_in, bool is_signed) {
  check_ebn_score(gamma_in, beta_in);
  const c10::cuda::CUDAGuard guard(gamma_in.device());
  const at::Tensor gamma = gamma_in.to(at::kDouble).contiguous(), beta = beta_in.to(at::kDouble).contiguous();
  at::Tensor score = at::empty_like(gamma);
  C10_CUDA_CHECK(launch_ebn_score(gamma.const_data_ptr<double>(), beta.const_data_ptr<double>(),
                                  score.data_ptr<double>(), gamma.numel(), is_signed,
                                  c10::cuda::getCurrentCUDAStream()));
  return score.to(gamma_in.scalar_type());
}

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Type::kDouble;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: return Type::kFloat;
  }
}

Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 32 ? x.clone() : x;  // a part of another tensor
}

Tensor channels_last(const Tensor& x) { return aligned(x.contiguous(at::MemoryFormat::ChannelsLast)); }

const int64_t* index_data(const OptTensor& index) { return index ? index->const_data_ptr<int64_t>() : nullptr; }

OptTensor contiguous_index(const OptTensor& index) { return index ? OptTensor(index->contiguous()) : std::nullopt; }

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_cuda(
    const Tensor& x_in, const Tensor& gamma, const Tensor& beta, const Tensor& running_mean, const Tensor& running_var,
    const OptTensor& live_in, const OptTensor& residual_in, const OptTensor& map_in, const OptTensor& act,
    const OptTensor& measure, bool training, bool relu, bool pool, double momentum, double eps, double act_keep,
    const OptTensor& bias) {
  check_bn_act(x_in, gamma, beta, running_mean, running_var, live_in, residual_in, map_in, act, measure, training,
               pool, bias);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = channels_last(x_in);
  const Tensor residual = residual_in ? channels_last(*residual_in) : Tensor();
  const OptTensor live = contiguous_index(live_in), map = contiguous_index(map_in);
  const auto format = pool ? at::MemoryFormat::ChannelsLast : x_in.suggest_memory_format();
  const Tensor out = at::empty({x.size(0), x.size(1), x.size(2) / (pool ? 2 : 1), x.size(3) / (pool ? 2 : 1)},
                               x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Tensor mean = at::empty({x.size(1)}, gamma.options()), invstd = at::empty_like(mean);
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  const Tensor gate = at::empty({bn_gate_bytes(type_of(x), rows, x.size(1))}, x.options().dtype(at::kByte));
  const Tensor coefficients = at::empty({2 * x.size(1)}, gamma.options());
  const Tensor partial = at::empty({2 * bn_chunks(type_of(x), rows, x.size(1)) * x.size(1)}, gamma.options());
  C10_CUDA_CHECK(launch_bn_act(
      BnAct{type_of(x), rows, x.size(1), gamma.size(0), index_data(live), x.const_data_ptr(),
            residual_in ? residual.const_data_ptr() : nullptr, residual_in ? residual.size(1) : 0, index_data(map),
            gamma.const_data_ptr(), beta.const_data_ptr(), running_mean.data_ptr(), running_var.data_ptr(),
            act ? act->data_ptr<float>() : nullptr, measure ? measure->const_data_ptr<bool>() : nullptr,
            bias ? bias->const_data_ptr() : nullptr, training, relu, pool ? x.size(3) : 0, momentum, eps, act_keep,
            out.data_ptr(), gate.data_ptr(), mean.data_ptr(), invstd.data_ptr(), coefficients.data_ptr(),
            partial.data_ptr()},
      c10::cuda::getCurrentCUDAStream()));
  return {out.contiguous(format), mean, invstd, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cuda(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& gate, const Tensor& gamma, const Tensor& mean_in,
    const Tensor& invstd, const OptTensor& live_in, const OptTensor& map_in, int64_t residual_channels, bool training,
    bool relu, bool pool) {
  check_bn_act_backward(grad_in, x_in, gamma, mean_in, invstd, live_in, map_in, residual_channels, pool);
  const int64_t rows = x_in.size(0) * x_in.size(2) * x_in.size(3);
  check_gate(gate, x_in, at::kByte, bn_gate_bytes(type_of(x_in), rows, x_in.size(1)));
  const c10::cuda::CUDAGuard guard(x_in.device());
  const auto format = pool ? at::MemoryFormat::ChannelsLast : x_in.suggest_memory_format();
  const Tensor grad = channels_last(grad_in), x = channels_last(x_in), mean = aligned(mean_in);
  const OptTensor live = contiguous_index(live_in), map = contiguous_index(map_in);
  const Tensor dx = at::empty_like(x, at::MemoryFormat::ChannelsLast);
  const Tensor dgamma = at::empty_like(gamma), dbeta = at::empty_like(gamma);
  Tensor dresidual = at::empty({0}, x.options());
  if (residual_channels >= 0) {
    dresidual = at::empty({x.size(0), residual_channels, x.size(2), x.size(3)},
                          x.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (map) dresidual.zero_();
  }
  const Tensor partial = at::empty({2 * bn_chunks(type_of(x), rows, x.size(1)) * x.size(1)}, gamma.options());
  const Tensor coefficients = at::empty({3 * x.size(1)}, gamma.options());
  C10_CUDA_CHECK(launch_bn_act_backward(
      BnActBackward{type_of(x), rows, x.size(1), gamma.size(0), index_data(live), grad.const_data_ptr(),
                    x.const_data_ptr(), gate.const_data_ptr(), gamma.const_data_ptr(), mean.const_data_ptr(),
                    invstd.const_data_ptr(), index_data(map), residual_channels, training, relu,
                    pool ? x.size(3) : 0, dx.data_ptr(), dgamma.data_ptr(), dbeta.data_ptr(),
                    residual_channels >= 0 ? dresidual.data_ptr() : nullptr, coefficients.data_ptr(),
                    partial.data_ptr()},
      c10::cuda::getCurrentCUDAStream()));
  return {dx.contiguous(format), dgamma, dbeta, residual_channels >= 0 ? dresidual.contiguous(format) : dresidual};
}

TORCH_LIBRARY_IMPL(gst, CUDA, m) {
  m.impl("ebn_score", ebn_score_cuda);
  m.impl("bn_act", bn_act_cuda);
  m.impl("bn_act_backward", bn_act_backward_cuda);
}

}  // namespace gst
