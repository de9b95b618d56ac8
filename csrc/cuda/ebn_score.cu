// E[BN] filter scores on the GPU. No torch headers here: they would take nvcc a minute.
#include "ebn_score.h"

#include "../gst_math.h"

namespace gst {

__global__ void ebn_score_kernel(const double* gamma, const double* beta, double* score, int64_t n, bool is_signed) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) score[i] = ebn_score(gamma[i], beta[i], is_signed);
}

cudaError_t launch_ebn_score(const double* gamma, const double* beta, double* score, int64_t n, bool is_signed,
                             cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int kThreads = 128;
  ebn_score_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(gamma, beta, score, n, is_signed);
  return cudaGetLastError();
}

}  // namespace gst
