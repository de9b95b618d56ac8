// What an operator hands to its kernels, on the CPU and on a GPU alike: pointers and sizes. No
// PyTorch headers here, because nvcc takes a minute for them.
#pragma once
#include <cstdint>

#include "gst_math.h"

namespace gst {

template <typename T>
GST_HD T* as(void* p) {
  return static_cast<T*>(p);
}
template <typename T>
GST_HD const T* as(const void* p) {
  return static_cast<const T*>(p);
}

enum class Type { kFloat, kDouble, kBFloat16 };

// bn_act and its backward pass. Maps are channels-last, `rows` = n h w rows of the c live channels,
// and begin at multiples of 32 bytes. Statistics and parameters are double beside double maps and
// float otherwise.
struct BnAct {
  Type type;  // of the maps
  int64_t rows, c, c_out;
  const int64_t* live;  // (c,) ascending: which of the c_out filters are live; null: all
  const void* x;
  int64_t residual_channels;
  const int64_t* residual_map;  // (c,): the residual's channel for each, -1: none; null: in order
  const void* gamma;
  bool training;
  int64_t pool_width;  // 0, or the even width of x's map: out and grad are of its 2x2 max-pool
  // Written by the forward pass and read by the backward pass: (c,), and a bit for each value of x,
  // set where ReLU and the pool let it through.
  void *mean, *invstd, *relu_bits;

  // The forward pass alone
  const void *residual, *beta;
  const void* bias;  // (c_out,) or null: what the convolution left out, for the running mean
  void *running_mean, *running_var;
  float* act;  // (c_out,); null: not updated
  bool relu;
  double momentum, eps, ema_decay;
  void* out;

  // The backward pass alone
  const void* grad;
  void *dx, *dgamma, *dbeta;
  void* dresidual;  // null: none; zeros where there is a residual_map

  // Scratch of the CUDA kernels, of the parameters' type: (3, c) and (bn_chunks(...), 2, c)
  void *coefficients, *partial;
};

}  // namespace gst
