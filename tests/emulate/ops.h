// What csrc/cuda/ops_cuda.cpp needs of c10::cuda, and its launches: by the library of kernels that
// emulated_use chose.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include "launch.h"

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

namespace emulate {

inline void* kernels = nullptr;
inline std::string said;

template <typename R, typename... A>
R call(const char* name, A... arguments) {
  return reinterpret_cast<R (*)(A...)>(dlsym(kernels, name))(arguments...);
}

inline cudaError_t outcome(const char* complaint) {
  said = complaint;
  return said.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulate

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "emulated: ", emulate::said)

extern "C" __attribute__((visibility("default"))) bool emulated_use(const char* path) {
  emulate::kernels = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return emulate::kernels;
}

namespace gst {

cudaError_t launch_bn_act(const BnAct& p, bool backward, cudaStream_t) {
  return emulate::outcome(emulate::call<const char*, BnAct, bool>("emulated_bn_act", p, backward));
}
cudaError_t launch_ebn_score(const double* gamma, const double* beta, double* score, int64_t n,
    bool is_signed, cudaStream_t) {
  return emulate::outcome(
      emulate::call<const char*>("emulated_ebn_score", gamma, beta, score, n, is_signed));
}
int64_t bn_chunks(Type type, int64_t rows, int64_t c) {
  return emulate::call<int64_t>("emulated_chunks", type, rows, c);
}
int64_t relu_bits_bytes(Type type, int64_t rows, int64_t c) {
  return emulate::call<int64_t>("emulated_bits_bytes", type, rows, c);
}

}  // namespace gst
