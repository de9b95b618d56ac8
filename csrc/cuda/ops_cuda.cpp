// The kernels of CUDA as operators.h asks for them: device, stream, scratch memory, launch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../operators.h"
#include "launch.h"

namespace gst {
namespace {

class CudaKernels {
  const c10::cuda::CUDAGuard guard;

 public:
  explicit CudaKernels(const Tensor& x) : guard(x.device()) {}

  void ebn_score(
      const double* gamma, const double* beta, double* score, int64_t n, bool is_signed) const {
    C10_CUDA_CHECK(
        launch_ebn_score(gamma, beta, score, n, is_signed, c10::cuda::getCurrentCUDAStream()));
  }

  int64_t relu_bits_bytes(Type type, int64_t rows, int64_t c) const {
    return gst::relu_bits_bytes(type, rows, c);
  }

  void run(BnAct p, bool backward, const at::TensorOptions& parameters) const {
    const Tensor coefficients = at::empty({3 * p.c}, parameters);
    const Tensor partial = at::empty({2 * bn_chunks(p.type, p.rows, p.c) * p.c}, parameters);
    p.coefficients = coefficients.data_ptr();
    p.partial = partial.data_ptr();
    C10_CUDA_CHECK(launch_bn_act(p, backward, c10::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

// What computes on a GPU; masked_conv2d is in ops.cpp.
TORCH_LIBRARY_IMPL(gst, CUDA, m) {
  m.impl("ebn_score", ebn_score<CudaKernels>);
  m.impl("bn_act", bn_act<CudaKernels>);
  m.impl("bn_act_backward", bn_act_backward<CudaKernels>);
}

}  // namespace gst
