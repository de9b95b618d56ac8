// The CUDA side of the operators: checks, device guard, current stream, launch.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
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

TORCH_LIBRARY_IMPL(gst, CUDA, m) { m.impl("ebn_score", ebn_score_cuda); }

}  // namespace gst
