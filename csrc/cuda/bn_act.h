// Plain launch functions of bn_act's CUDA kernels. Maps are channels-last: `rows` = n h w rows of c channels. They, as
// well as mean and coefficients, begin at multiples of 32 bytes.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace gst {

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };  // of maps; parameters are float, or double beside double maps

struct BnAct {
  Type type;
  int64_t rows, c, c_out;
  const int64_t* live;  // (c,) ascending, or null for all filters
  const void* x;
  const void* residual;  // null: none
  int64_t residual_width;
  const int64_t* residual_map;  // (c,), -1 for nothing, or null
  const void *gamma, *beta;
  void *running_mean, *running_var;
  float* act;           // null: not measured
  const bool* measure;  // null: measure whenever there is an act
  const void* bias;     // (c_out,), or null: what the convolution left out of x, for the running mean alone
  bool training, relu;
  int64_t pool_width;  // 0, or the map's width, even as its height: a 2x2 max-pool follows, and out is pooled
  double momentum, eps, act_keep;
  void *out, *gate, *mean, *invstd;
  void* coefficients;  // 2 * c of the parameters' type
  void* partial;       // 2 * bn_chunks(type, rows, c) * c of the parameters' type
};

struct BnActBackward {
  Type type;
  int64_t rows, c, c_out;
  const int64_t* live;
  const void *grad, *x, *gate;
  const void *gamma, *mean, *invstd;
  const int64_t* residual_map;
  int64_t residual_width;
  bool training, relu;
  int64_t pool_width;  // as in BnAct: grad is of the pooled map
  void *dx, *dgamma, *dbeta;
  void* dresidual;     // null: none; zeros where there is a map
  void* coefficients;  // 3 * c of the parameters' type
  void* partial;
};

// How many chunks the rows are summed in: by the map's size alone, so that sums repeat exactly.
int64_t bn_chunks(Type type, int64_t rows, int64_t c);

// The size of the gate: a bit a value, or two where c is no multiple of what 16 bytes hold.
int64_t bn_gate_bytes(Type type, int64_t rows, int64_t c);

cudaError_t launch_bn_act(const BnAct& p, cudaStream_t stream);
cudaError_t launch_bn_act_backward(const BnActBackward& p, cudaStream_t stream);

}  // namespace gst
