// E[BN] filter scores on the CPU: a layer has a few hundred filters, so a plain loop is all it takes.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../gst_math.h"

namespace gst {

at::Tensor ebn_score_cpu(const at::Tensor& gamma_in, const at::Tensor& beta_in, bool is_signed) {
  check_ebn_score(gamma_in, beta_in);
  const at::Tensor gamma = gamma_in.contiguous(), beta = beta_in.contiguous();
  at::Tensor score = at::empty_like(gamma);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gamma.scalar_type(), "ebn_score", [&] {
    const scalar_t *g = gamma.const_data_ptr<scalar_t>(), *b = beta.const_data_ptr<scalar_t>();
    scalar_t* s = score.data_ptr<scalar_t>();
    for (int64_t i = 0; i < gamma.numel(); ++i)
      s[i] = static_cast<scalar_t>(ebn_score(static_cast<double>(g[i]), static_cast<double>(b[i]), is_signed));
  });
  return score;
}

TORCH_LIBRARY_IMPL(gst, CPU, m) { m.impl("ebn_score", ebn_score_cpu); }

}  // namespace gst
