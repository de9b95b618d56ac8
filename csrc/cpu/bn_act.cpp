// Batch norm + shortcut + mean |a| + ReLU (+ a 2x2 max-pool) on the CPU: two passes over the data
// forward, two backward; and the E[BN] scores.
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../operators.h"
#include "clones.h"

namespace gst {
namespace {

constexpr int64_t kBits = 32;  // rows of a word of relu_bits, which has one word for each channel
constexpr int kWindow = 4;     // rows of a pooling window
// Sums are taken over at most kMostChunks chunks of at least kLeastRows rows, whatever the number
// of threads is, and then over the chunks in order, so that they repeat exactly.
constexpr int64_t kMostChunks = 64, kLeastRows = 64;

// Parameters, sums and coefficients beside maps of T.
template <typename T>
using Parameter = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows of a map from begin to end. With a pool they are numbered window by window, kWindow to each.
struct Rows {
  int64_t begin, end, c;
  int64_t windows;  // in two lines of the map; 0 without a pool
};

template <typename T, typename A = Parameter<T>>
struct Forward {  // whole maps, and one value a channel
  const T *x, *residual;
  int64_t residual_channels;
  const int32_t* sources;  // residual_map
  T* out;
  uint32_t* bits;
  const A *mean, *scale, *shift;
  A floor;
};

template <typename T, typename A = Parameter<T>>
struct Backward {
  const T *grad, *x;
  const uint32_t* bits;
  T *dx, *dresidual;
  int64_t residual_channels;
  const int32_t* targets;  // the inverse of residual_map, -1 for a channel that is not added
  const A *mean, *ka, *kb, *kc;
};

enum Shortcut { kNone, kDirect, kMapped };

template <Shortcut shortcut_kind, bool with_pool>
struct Case {
  static constexpr Shortcut shortcut = shortcut_kind;
  static constexpr bool pool = with_pool;
};

template <typename F>
GST_BODY void choose_case(bool pool, bool shortcut, bool mapped, const F& f) {
  if (pool) f(Case<kNone, true>());
  else if (!shortcut) f(Case<kNone, false>());
  else if (!mapped) f(Case<kDirect, false>());
  else f(Case<kMapped, false>());
}

// Asks for the row of a map some rows ahead: with several maps read at once the processor's own
// prefetching comes late.
template <typename T>
GST_BODY void prefetch_row(const T* row, int64_t c) {
  constexpr int64_t kAhead = 4096 / sizeof(T), kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < c; i += kLine) __builtin_prefetch(row + kAhead + i);
}

// Calls step(row, offset in the map, offset in the result) for each row or, with a pool, for each
// window's first. One row after the other: several at a time would load the coefficients less
// often, but were up to half as fast, since processors prefetch one stream.
template <bool pool, typename F>
GST_BODY void for_rows(const Rows& rows, const F& step) {
  for (int64_t row = rows.begin; row < rows.end; row += pool ? kWindow : 1) {
    const int64_t window = row / kWindow, windows = rows.windows;
    if constexpr (pool)
      step(row, (window / windows * windows * 2 + window % windows) * 2 * rows.c, window * rows.c);
    else step(row, row * rows.c, row * rows.c);
  }
}

// The offset from a window's first row to its row k.
GST_BODY int64_t window_offset(int k, const Rows& rows) {
  return ((k & 1) + (k >> 1) * 2 * rows.windows) * rows.c;
}

template <typename T, typename A>
GST_BODY void moments_body(const T* map, const Rows& rows, const A* __restrict pivot,
    A* __restrict sum, A* __restrict sum2) {
  for_rows<false>(rows, [&](int64_t, int64_t at, int64_t) GST_INLINE {
    const T* __restrict x = map + at;
#pragma GCC ivdep
    for (int64_t i = 0; i < rows.c; ++i) {
      const A a = A(x[i]) - pivot[i];
      sum[i] += a;
      sum2[i] += a * a;
    }
  });
}

// GCC heeds __restrict of parameters more than of local variables.
template <Shortcut shortcut, bool pool, bool measure, typename T, typename A>
GST_BODY void apply_row(const Forward<T, A>& f, const Rows& rows, int64_t row,
    const T* __restrict x, const T* __restrict residual, T* __restrict out, A* __restrict sum) {
  uint32_t* word = f.bits + row / kBits * rows.c;
  const int64_t bit = row % kBits;
  const uint32_t keep = bit ? ~0u : 0u;  // the memory of a new word holds anything
#pragma GCC ivdep
  for (int64_t i = 0; i < rows.c; ++i) {
    uint32_t bits = word[i] & keep, best = 0;
    A magnitude = 0, top = 0;
#pragma GCC unroll 4
    for (int k = 0; k < (pool ? kWindow : 1); ++k) {
      A a = bn_value(A(x[window_offset(k, rows) + i]), f.mean[i], f.scale[i], f.shift[i]);
      if constexpr (shortcut == kDirect) a += A(residual[i]);
      if constexpr (shortcut == kMapped) a += f.sources[i] < 0 ? A(0) : A(residual[f.sources[i]]);
      if constexpr (measure) magnitude += std::fabs(a);
      if constexpr (pool) {  // as max_pool2d: the first of the largest values, or the last NaN
        a = A(T(a));
        const bool better = k == 0 || (a > top) | (a != a);
        top = better ? a : top;
        best = better ? 1u << (bit + k) : best;
      } else {
        bits |= relu_passes(a, f.floor) ? 1u << (bit + k) : 0u;
        out[i] = T(relu_value(a, f.floor));
      }
    }
    if constexpr (pool) {
      bits |= relu_passes(top, f.floor) ? best : 0u;
      out[i] = T(relu_value(top, f.floor));
    }
    if constexpr (measure) sum[i] += magnitude;
    word[i] = bits;
  }
}

template <typename T, typename A>
GST_BODY void apply_body(const Forward<T, A>& f, const Rows& rows, A* sum) {
  choose_case(rows.windows, f.residual, f.sources, [&](auto chosen) GST_INLINE {
    using C = decltype(chosen);
    for_rows<C::pool>(rows, [&](int64_t row, int64_t at, int64_t at_out) GST_INLINE {
      const T *x = f.x + at, *residual = f.residual + row * f.residual_channels;
      if (sum)
        apply_row<C::shortcut, C::pool, true>(f, rows, row, x, residual, f.out + at_out, sum);
      else apply_row<C::shortcut, C::pool, false>(f, rows, row, x, residual, f.out + at_out, sum);
    });
  });
}

template <typename T, typename A>
GST_BODY void gradient_sums_body(
    const Backward<T, A>& f, const Rows& rows, A* __restrict sum, A* __restrict sum_x) {
  choose_case(rows.windows, false, false, [&](auto chosen) GST_INLINE {
    constexpr bool pool = decltype(chosen)::pool;
    for_rows<pool>(rows, [&](int64_t row, int64_t at, int64_t at_grad) GST_INLINE {
      const T* __restrict grad = f.grad + at_grad, * __restrict x = f.x + at;
      const uint32_t* __restrict word = f.bits + row / kBits * rows.c;
      const A* __restrict mean = f.mean;
      if constexpr (!pool) {
        prefetch_row(grad, rows.c);
        prefetch_row(x, rows.c);
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < rows.c; ++i) {
        A s = 0, sx = 0;
#pragma GCC unroll 4
        for (int k = 0; k < (pool ? kWindow : 1); ++k) {
          const A g = word[i] & 1u << (row % kBits + k) ? A(grad[i]) : A(0);
          s += g;
          sx += g * (A(x[window_offset(k, rows) + i]) - mean[i]);
        }
        sum[i] += s;
        sum_x[i] += sx;
      }
    });
  });
}

template <Shortcut shortcut, bool pool, typename T, typename A>
GST_BODY void gradient_row(const Backward<T, A>& f, const Rows& rows, int64_t row,
    const T* __restrict grad, const T* __restrict x, T* __restrict dx, T* __restrict dresidual) {
  const uint32_t* word = f.bits + row / kBits * rows.c;
  const int64_t bit = row % kBits;
#pragma GCC ivdep
  for (int64_t i = 0; i < rows.c; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < (pool ? kWindow : 1); ++k) {
      const A g = word[i] & 1u << (bit + k) ? A(grad[i]) : A(0);
      const A value = A(x[window_offset(k, rows) + i]);
      dx[window_offset(k, rows) + i] = T(bn_dx(g, value, f.mean[i], f.ka[i], f.kb[i], f.kc[i]));
      if constexpr (shortcut == kDirect) dresidual[i] = T(g);
    }
  if constexpr (shortcut == kMapped)
#pragma GCC ivdep
    for (int64_t j = 0; j < f.residual_channels; ++j) {
      const int32_t i = f.targets[j];
      dresidual[j] = i >= 0 && word[i] & 1u << bit ? grad[i] : T(0);
    }
}

template <typename T, typename A>
GST_BODY void gradient_body(const Backward<T, A>& f, const Rows& rows) {
  choose_case(rows.windows, f.dresidual, f.targets, [&](auto chosen) GST_INLINE {
    using C = decltype(chosen);
    for_rows<C::pool>(rows, [&](int64_t row, int64_t at, int64_t at_grad) GST_INLINE {
      if constexpr (!C::pool) {
        prefetch_row(f.grad + at_grad, rows.c);
        prefetch_row(f.x + at, rows.c);
      }
      gradient_row<C::shortcut, C::pool>(f, rows, row, f.grad + at_grad, f.x + at, f.dx + at,
          f.dresidual + row * f.residual_channels);
    });
  });
}

// A function with GST_CLONES cannot be a template.
#define GST_LOOPS(T, A)                                                                     \
  GST_CLONES void moments(const T* x, const Rows& rows, const A* pivot, A* sum, A* sum2) {  \
    moments_body(x, rows, pivot, sum, sum2);                                                \
  }                                                                                         \
  GST_CLONES void apply(const Forward<T>& f, const Rows& rows, A* sum) {                    \
    apply_body(f, rows, sum);                                                               \
  }                                                                                         \
  GST_CLONES void gradient_sums(const Backward<T>& f, const Rows& rows, A* sum, A* sum_x) { \
    gradient_sums_body(f, rows, sum, sum_x);                                                \
  }                                                                                         \
  GST_CLONES void gradient(const Backward<T>& f, const Rows& rows) { gradient_body(f, rows); }
GST_LOOPS(float, float)
GST_LOOPS(double, double)
GST_LOOPS(at::BFloat16, float)
#undef GST_LOOPS

int64_t rows_of_chunk(int64_t rows) {
  return std::max(kLeastRows, divide_up(divide_up(rows, kMostChunks), kBits) * kBits);
}

int64_t count_chunks(int64_t rows) { return divide_up(rows, rows_of_chunk(rows)); }

// Calls f(chunk, its rows) for all chunks, shared among the threads; reversed, each thread goes
// from its last to its first, so that a second pass over a map begins with what the first has left
// in the caches.
template <typename F>
void for_chunks(const BnAct& p, bool reversed, const F& f) {
  if (p.c == 0) return;
  const int64_t each = rows_of_chunk(p.rows);
  at::parallel_for(0, count_chunks(p.rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = reversed ? begin + end - 1 - i : i;
      f(k, Rows{k * each, std::min((k + 1) * each, p.rows), p.c, p.pool_width / 2});
    }
  });
}

// One sum a channel from those of the chunks.
template <typename A>
std::vector<double> add_chunks(const std::vector<A>& sums, int64_t c) {
  std::vector<double> totals(c);
  for (size_t i = 0; i < sums.size(); i += c)
    for (int64_t channel = 0; channel < c; ++channel) totals[channel] += sums[i + channel];
  return totals;
}

template <typename A, typename F>
std::vector<A> for_channels(int64_t c, const F& value) {
  std::vector<A> values(c);
  for (int64_t i = 0; i < c; ++i) values[i] = static_cast<A>(value(i));
  return values;
}

// residual_map in 32 bits, checked; empty without one.
std::vector<int32_t> residual_sources(const BnAct& p) {
  std::vector<bool> taken(std::max<int64_t>(p.residual_channels, 0));
  return for_channels<int32_t>(p.residual_map ? p.c : 0, [&](int64_t i) {
    const int64_t j = p.residual_map[i];
    TORCH_CHECK_INDEX(
        j < p.residual_channels, "residual_map points at channel ", j, " of ", p.residual_channels);
    TORCH_CHECK_INDEX(j < 0 || !taken[j], "residual_map points at channel ", j, " twice");
    if (j >= 0) taken[j] = true;
    return j;
  });
}

// A statistic of all filters takes in value(i) of the i-th live one, and 0 of the pruned ones,
// whose map is zero.
template <typename A, typename F>
void update(void* statistic, int64_t c_out, const std::vector<int64_t>& filters, double momentum,
    const F& value) {
  std::vector<double> batch(c_out);
  for (size_t i = 0; i < filters.size(); ++i) batch[filters[i]] = value(i);
  A* s = as<A>(statistic);
  for (int64_t i = 0; i < c_out; ++i) s[i] = static_cast<A>(running(s[i], batch[i], momentum));
}

template <typename T>
void forward(const BnAct& p) {
  using A = Parameter<T>;
  const std::vector<int64_t> filters = live_channels(p.live, p.c, p.c_out);
  const std::vector<int32_t> sources = residual_sources(p);
  const auto of_filter = [&](const void* v, int64_t i) -> double { return as<A>(v)[filters[i]]; };
  const auto bias = [&](int64_t i) { return p.bias ? of_filter(p.bias, i) : 0; };
  const T* x = as<T>(p.x);
  A *mean = as<A>(p.mean), *invstd = as<A>(p.invstd);
  const double count = static_cast<double>(p.rows);
  const int64_t c = p.c, chunks = count_chunks(p.rows);
  if (p.training) {
    const auto pivot = for_channels<A>(c, [&](int64_t i) { return bn_pivot(A(x[i])); });
    std::vector<A> sum(chunks * c), sum2(chunks * c);
    for_chunks(p, false, [&](int64_t k, const Rows& rows) {
      moments(x, rows, pivot.data(), sum.data() + k * c, sum2.data() + k * c);
    });
    const auto totals = add_chunks(sum, c), totals2 = add_chunks(sum2, c);
    const auto var = for_channels<double>(c, [&](int64_t i) {
      const BnMoments b = bn_moments(totals[i], totals2[i], pivot[i], count, p.eps);
      mean[i] = b.mean, invstd[i] = b.invstd;
      return b.var;
    });
    update<A>(
        p.running_mean, p.c_out, filters, p.momentum, [&](int64_t i) { return mean[i] + bias(i); });
    update<A>(p.running_var, p.c_out, filters, p.momentum,
        [&](int64_t i) { return unbiased(var[i], count); });
  } else {
    for (int64_t i = 0; i < c; ++i) {
      mean[i] = of_filter(p.running_mean, i);
      invstd[i] = 1 / std::sqrt(of_filter(p.running_var, i) + p.eps);
    }
  }

  const auto scale =
      for_channels<A>(c, [&](int64_t i) { return of_filter(p.gamma, i) * invstd[i]; });
  // A bias that is not finite makes the map NaN, as it does where it is added.
  const auto shift =
      for_channels<A>(c, [&](int64_t i) { return of_filter(p.beta, i) + 0 * bias(i); });
  std::vector<A> magnitude(p.act ? chunks * c : 0);
  const Forward<T> f{x, as<T>(p.residual), p.residual_channels,
      p.residual_map ? sources.data() : nullptr, as<T>(p.out), as<uint32_t>(p.relu_bits), mean,
      scale.data(), shift.data(), relu_floor<A>(p.relu)};
  for_chunks(p, p.training, [&](int64_t k, const Rows& rows) {
    apply(f, rows, p.act ? magnitude.data() + k * c : nullptr);
  });
  if (!p.act) return;
  const auto totals = add_chunks(magnitude, c);
  update<float>(
      p.act, p.c_out, filters, 1 - p.ema_decay, [&](int64_t i) { return totals[i] / count; });
}

template <typename T>
void backward(const BnAct& p) {
  using A = Parameter<T>;
  const std::vector<int64_t> filters = live_channels(p.live, p.c, p.c_out);
  const std::vector<int32_t> sources = residual_sources(p);
  std::vector<int32_t> targets(p.residual_map ? p.residual_channels : 0, -1);
  for (size_t i = 0; i < sources.size(); ++i)
    if (sources[i] >= 0) targets[sources[i]] = static_cast<int32_t>(i);
  A *dgamma = as<A>(p.dgamma), *dbeta = as<A>(p.dbeta);
  const int64_t c = p.c, chunks = count_chunks(p.rows);
  std::vector<A> sum(chunks * c), sum_x(chunks * c), ka(c), kb(c), kc(c);
  const Backward<T> f{as<T>(p.grad), as<T>(p.x), as<uint32_t>(p.relu_bits), as<T>(p.dx),
      as<T>(p.dresidual), p.residual_channels, p.residual_map ? targets.data() : nullptr,
      as<A>(p.mean), ka.data(), kb.data(), kc.data()};
  for_chunks(p, false, [&](int64_t k, const Rows& rows) {
    gradient_sums(f, rows, sum.data() + k * c, sum_x.data() + k * c);
  });
  const auto totals = add_chunks(sum, c), totals_x = add_chunks(sum_x, c);
  std::fill_n(dgamma, p.c_out, A(0));
  std::fill_n(dbeta, p.c_out, A(0));
  for (int64_t i = 0; i < c; ++i) {
    const int64_t filter = filters[i];
    const double invstd = as<A>(p.invstd)[i];
    dbeta[filter] = totals[i];
    dgamma[filter] = totals_x[i] * invstd;
    const BnGradient k = bn_gradient(totals[i], totals_x[i], as<A>(p.gamma)[filter], invstd,
        static_cast<double>(p.rows), p.training);
    ka[i] = k.ka, kb[i] = k.kb, kc[i] = k.kc;
  }
  for_chunks(p, true, [&](int64_t, const Rows& rows) { gradient(f, rows); });
}

struct CpuKernels {
  explicit CpuKernels(const Tensor&) {}

  void ebn_score(
      const double* gamma, const double* beta, double* score, int64_t n, bool is_signed) const {
    for (int64_t i = 0; i < n; ++i) score[i] = gst::ebn_score(gamma[i], beta[i], is_signed);
  }

  int64_t relu_bits_bytes(Type, int64_t rows, int64_t c) const {
    return divide_up(rows, kBits) * c * 4;
  }

  void run(const BnAct& p, bool is_backward, const at::TensorOptions&) const {
    const auto call = [&](auto t) {
      is_backward ? backward<decltype(t)>(p) : forward<decltype(t)>(p);
    };
    if (p.type == Type::kDouble) call(double());
    else if (p.type == Type::kFloat) call(float());
    else call(at::BFloat16());
  }
};

}  // namespace

// What computes on the CPU; the schemas are in ops.cpp.
TORCH_LIBRARY_IMPL(gst, CPU, m) {
  m.impl("ebn_score", ebn_score<CpuKernels>);
  m.impl("bn_act", bn_act<CpuKernels>);
  m.impl("bn_act_backward", bn_act_backward<CpuKernels>);
}

}  // namespace gst
