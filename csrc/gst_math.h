// Arithmetic that the CPU and the CUDA kernels share, so that testing one tests the other.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define GST_HD __host__ __device__ __forceinline__
#else
#define GST_HD inline
#endif

namespace gst {

// phi(u) - u Phi(-u) for u >= 0: the mean of max(0, Z - u), Z standard normal. Relative error below
// 1e-12 to u = 30.
//
// Below 5 the closed form loses at most a factor of 30 to cancellation. Above, phi(u) is multiplied
// by one minus the Mills ratio's u R(u), which with R(u) = 1 / (u + K), K = 1/(u + 2/(u + 3/(u +
// ...))), is K / (u + K), without any cancellation.
GST_HD double normal_tail_mean(double u) {
  const double phi = 0.39894228040143267794 * exp(-0.5 * u * u);
  if (u < 5) return phi - u * 0.5 * erfc(u * 0.70710678118654752440);
  double k = 0;
  for (int i = 64; i >= 1; --i) k = i / (u + k);
  return phi * (k / (u + k));
}

// E[max(0, M)], M ~ N(beta, |gamma|) (B.2.1); with is_signed, gamma in place of |gamma| (B.2.3),
// which for gamma < 0 makes it -E[max(0, -M)]. gamma = 0 gives max(beta, 0). Never NaN for finite
// input, and NaN for NaN.
GST_HD double ebn_score(double gamma, double beta, bool is_signed) {
  if (gamma == 0) return beta <= 0 ? 0 : beta;
  const bool negative = is_signed && gamma < 0;
  const double scale = fabs(gamma), mean = negative ? -beta : beta;
  const double ratio = fabs(mean) / scale, u = ratio > 1e3 ? 1e3 : ratio;  // phi(40) is 0 already
  const double score = (mean <= 0 ? 0 : mean) + scale * normal_tail_mean(u);
  return negative ? -score : score;
}

// The sums of a channel are of x - pivot, pivot its first value, so that they keep their digits. If
// that is not finite, the pivot is 0.
template <typename A>
GST_HD A bn_pivot(A first) {
  return first - first == 0 ? first : A(0);
}

struct BnMoments {
  double mean, var, invstd;
};

// The statistics of a channel from the sums of x - pivot and of its square over `count` values.
GST_HD BnMoments bn_moments(
    double sum, double sum_of_squares, double pivot, double count, double eps) {
  const double shift = sum / count;
  const double var = sum_of_squares / count - shift * shift,
               rounded = var < 0 ? 0 : var;  // NaN stays NaN
  return {pivot + shift, rounded, 1 / sqrt(rounded + eps)};
}

GST_HD double running(double old, double value, double momentum) {
  return (1 - momentum) * old + momentum * value;
}

GST_HD double unbiased(double var, double count) { return var * (count / (count - 1)); }

// The value before ReLU, of a channel with this mean, scale = gamma / std and shift = beta.
template <typename A>
GST_HD A bn_value(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

// The value that ReLU raises lower ones to: 0, or without ReLU NaN, to which nothing compares as
// lower.
template <typename A>
GST_HD A relu_floor(bool relu) {
  return relu ? A(0) : static_cast<A>(NAN);
}

// NaN passes, so that a diverged run shows.
template <typename A>
GST_HD A relu_value(A a, A floor) {
  return a < floor ? floor : a;
}

template <typename A>
GST_HD bool relu_passes(A a, A floor) {
  return !(a <= floor);
}

// dx = g * ka + (x - mean) * kb + kc, g the gradient that ReLU let through.
struct BnGradient {
  double ka, kb, kc;
};

// The coefficients of a channel from the sums of g and of g (x - mean).
GST_HD BnGradient bn_gradient(
    double sum, double sum_x, double gamma, double invstd, double count, bool training) {
  const double ka = gamma * invstd;
  if (!training) return {ka, 0, 0};
  return {ka, -ka * invstd * invstd * sum_x / count, -ka * sum / count};
}

template <typename A>
GST_HD A bn_dx(A g, A x, A mean, A ka, A kb, A kc) {
  return g * ka + (kb == 0 ? A(0) : (x - mean) * kb) +
      kc;  // in evaluation an infinite x has a finite gradient
}

}  // namespace gst
