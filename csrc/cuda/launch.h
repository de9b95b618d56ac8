// Launches of the CUDA kernels. All pointers are the device's.
#pragma once
#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace gst {

// score[i] = E[BN](gamma[i], beta[i]) for i < n.
cudaError_t launch_ebn_score(const double* gamma, const double* beta, double* score, int64_t n,
    bool is_signed, cudaStream_t stream);

cudaError_t launch_bn_act(const BnAct& p, bool backward, cudaStream_t stream);

// How many chunks the rows are summed in: by the map's size alone, so that sums repeat exactly.
int64_t bn_chunks(Type type, int64_t rows, int64_t c);

// The size of relu_bits: a bit a value, or two if c is not a multiple of what 16 bytes hold.
int64_t relu_bits_bytes(Type type, int64_t rows, int64_t c);

}  // namespace gst
