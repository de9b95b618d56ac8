// Plain launch functions of the CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace gst {

// score[i] = E[BN](gamma[i], beta[i]) for i < n, on `stream`; all three are device pointers.
cudaError_t launch_ebn_score(const double* gamma, const double* beta, double* score, int64_t n, bool is_signed,
                             cudaStream_t stream);

}  // namespace gst
