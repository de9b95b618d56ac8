// Arithmetic that the CPU and the CUDA kernels share, so that testing one tests the other.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define GST_HD __host__ __device__ __forceinline__
#else
#define GST_HD inline
#endif

namespace gst {

// phi(u) - u Phi(-u) for u >= 0: the mean of max(0, Z - u), Z standard normal. Relative error below 1e-12 to u = 30.
//
// Below 5 the closed form loses at most a factor of 30 to cancellation. Above, phi(u) times one minus the Mills ratio's
// u R(u), which with R(u) = 1 / (u + K), K = 1/(u + 2/(u + 3/(u + ...))), is K / (u + K) and cancels nothing.
GST_HD double normal_tail_mean(double u) {
  const double phi = 0.39894228040143267794 * exp(-0.5 * u * u);
  if (u < 5) return phi - u * 0.5 * erfc(u * 0.70710678118654752440);
  double k = 0;
  for (int i = 64; i >= 1; --i) k = i / (u + k);
  return phi * (k / (u + k));
}

// E[max(0, M)], M ~ N(beta, |gamma|) (B.2.1); with is_signed, gamma in place of |gamma| (B.2.3), which for gamma < 0
// makes it -E[max(0, -M)]. gamma = 0 gives max(beta, 0). Never NaN for finite input, and NaN for NaN.
GST_HD double ebn_score(double gamma, double beta, bool is_signed) {
  if (gamma == 0) return beta <= 0 ? 0 : beta;
  const bool negative = is_signed && gamma < 0;
  const double scale = fabs(gamma), mean = negative ? -beta : beta;
  const double ratio = fabs(mean) / scale, u = ratio > 1e3 ? 1e3 : ratio;  // phi(40) is 0 already
  const double score = (mean <= 0 ? 0 : mean) + scale * normal_tail_mean(u);
  return negative ? -score : score;
}

// Batch norm of one filter: mean and 1/std from the sums of (x - pilot) and its square over `count` values, and the
// running statistics, which take the unbiased variance. Always in double: a layer has a few hundred filters.
struct BnMoments {
  double mean, var, invstd;
};

// Where the sums start from, so that they keep their digits: the channel's first value.
template <typename A>
GST_HD A bn_pilot(A x) {
  return x - x == 0 ? x : A(0);  // from infinity, nothing could be measured
}

GST_HD BnMoments bn_moments(double sum, double sum_of_squares, double pilot, double count, double eps) {
  const double shift = sum / count;
  const double var = sum_of_squares / count - shift * shift, rounded = var < 0 ? 0 : var;  // NaN stays
  return {pilot + shift, rounded, 1 / sqrt(rounded + eps)};
}

GST_HD double running(double old, double value, double momentum) { return (1 - momentum) * old + momentum * value; }

GST_HD double unbiased(double var, double count) { return var * (count / (count - 1)); }

// The value before ReLU, of a channel with this mean, scale = gamma / std and shift = beta.
template <typename A>
GST_HD A bn_value(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

// ReLU's lowest value: 0, or for none NaN, below which nothing is.
template <typename A>
GST_HD A lowest_value(bool relu) {
  return relu ? A(0) : static_cast<A>(NAN);
}

// Not-a-number passes, so that a diverged run is seen.
template <typename A>
GST_HD A act_value(A a, A lowest) {
  return a < lowest ? lowest : a;
}

template <typename A>
GST_HD bool act_passes(A a, A lowest) {
  return !(a <= lowest);
}

// dx = g * ka + (x - mean) * kb + kc, g the gated gradient, from the sums of g and of g (x - mean).
struct BnGradient {
  double ka, kb, kc;
};

GST_HD BnGradient bn_gradient(double sum, double sum_x, double gamma, double invstd, double count, bool training) {
  const double ka = gamma * invstd;
  if (!training) return {ka, 0, 0};
  return {ka, -ka * invstd * invstd * sum_x / count, -ka * sum / count};
}

template <typename A>
GST_HD A bn_dx(A g, A x, A mean, A ka, A kb, A kc) {
  return g * ka + (kb == 0 ? A(0) : (x - mean) * kb) + kc;  // in evaluation an infinite x has a finite gradient
}

}  // namespace gst
