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

}  // namespace gst
