// Batch norm + shortcut + mean |a| + ReLU on the CPU: two passes over the data forward, two backward.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../checks.h"
#include "../gst_math.h"

// An extension is compiled for the oldest CPU of its kind, at::vec with it. Clones, chosen when the library loads, are
// how plain loops get the vectors of the CPU they run on.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define GST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GST_BODY static inline __attribute__((always_inline))
#else
#define GST_CLONES
#define GST_BODY static inline
#endif

namespace gst {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kLanes = 16;   // columns of a plane in NCHW: one AVX-512 vector of float
constexpr int64_t kChunks = 64;  // a fixed number, so that sums do not depend on the number of threads

// +------------------------------------------------------------------------------------------------------------------+
// | The loops, over rows of `width` columns; each column has its own coefficients and sums                           |
// +------------------------------------------------------------------------------------------------------------------+

enum Shortcut { kNone, kDirect, kMapped };

template <typename T, typename A>
GST_BODY void moments_body(const T* __restrict x, int64_t rows, int64_t width, const A* __restrict pilot,
                           A* __restrict sum, A* __restrict sum2) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, x += 4 * width)  // four rows for each load and store of the sums
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A p = pilot[i];
      const A a = A(x[i]) - p, b = A(x[width + i]) - p, c = A(x[2 * width + i]) - p, d = A(x[3 * width + i]) - p;
      sum[i] += (a + b) + (c + d);
      sum2[i] += (a * a + b * b) + (c * c + d * d);
    }
  for (; r < rows; ++r, x += width)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A a = A(x[i]) - pilot[i];
      sum[i] += a;
      sum2[i] += a * a;
    }
}

template <Shortcut kind, bool measure, typename T, typename A>
GST_BODY void apply_rows(const T* __restrict x, const T* __restrict residual, int64_t residual_width,
                         const int32_t* __restrict map, T* __restrict out, int64_t rows, int64_t width,
                         const A* __restrict mean, const A* __restrict scale, const A* __restrict shift, A lowest,
                         A* __restrict sum) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      A a = bn_value(A(x[i]), mean[i], scale[i], shift[i]);
      if constexpr (kind == kDirect) a += A(residual[i]);
      if constexpr (kind == kMapped) a += map[i] < 0 ? A(0) : A(residual[map[i]]);
      if constexpr (measure) sum[i] += a < 0 ? -a : a;
      out[i] = T(act_value(a, lowest));
    }
    if constexpr (kind != kNone) residual += residual_width;
  }
}

template <typename T, typename A>
GST_BODY void apply_body(const T* x, const T* residual, int64_t residual_width, const int32_t* map, T* out,
                         int64_t rows, int64_t width, const A* mean, const A* scale, const A* shift, A lowest, A* sum) {
#define GST_ROWS(kind, measure) \
  apply_rows<kind, measure>(x, residual, residual_width, map, out, rows, width, mean, scale, shift, lowest, sum)
  if (!residual) {
    sum ? GST_ROWS(kNone, true) : GST_ROWS(kNone, false);
  } else if (!map) {
    sum ? GST_ROWS(kDirect, true) : GST_ROWS(kDirect, false);
  } else {
    sum ? GST_ROWS(kMapped, true) : GST_ROWS(kMapped, false);
  }
#undef GST_ROWS
}

template <typename T, typename A>
GST_BODY void gradient_sums_body(const T* __restrict grad, const T* __restrict x, const T* __restrict out,
                                 int64_t rows, int64_t width, const A* __restrict mean, A lowest, A* __restrict sum,
                                 A* __restrict sum_x) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, grad += 2 * width, x += 2 * width, out += 2 * width)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A g = act_gate(A(grad[i]), A(out[i]), lowest);
      const A h = act_gate(A(grad[width + i]), A(out[width + i]), lowest);
      sum[i] += g + h;
      sum_x[i] += g * (A(x[i]) - mean[i]) + h * (A(x[width + i]) - mean[i]);
    }
  for (; r < rows; ++r, grad += width, x += width, out += width)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A g = act_gate(A(grad[i]), A(out[i]), lowest);
      sum[i] += g;
      sum_x[i] += g * (A(x[i]) - mean[i]);
    }
}

template <Shortcut kind, typename T, typename A>
GST_BODY void gradient_rows(const T* __restrict grad, const T* __restrict x, const T* __restrict out,
                            T* __restrict dx, T* __restrict dresidual, int64_t residual_width,
                            const int32_t* __restrict inverse, int64_t rows, int64_t width, const A* __restrict mean,
                            const A* __restrict ka, const A* __restrict kb, const A* __restrict kc, A lowest) {
  for (int64_t r = 0; r < rows; ++r, grad += width, x += width, out += width, dx += width) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A g = act_gate(A(grad[i]), A(out[i]), lowest);
      dx[i] = T(g * ka[i] + (A(x[i]) - mean[i]) * kb[i] + kc[i]);
      if constexpr (kind == kDirect) dresidual[i] = T(g);
    }
    if constexpr (kind == kMapped)
#pragma GCC ivdep
      for (int64_t j = 0; j < residual_width; ++j) {
        const int32_t i = inverse[j];
        dresidual[j] = i < 0 ? T(0) : T(act_gate(A(grad[i]), A(out[i]), lowest));
      }
    if constexpr (kind != kNone) dresidual += residual_width;
  }
}

template <typename T, typename A>
GST_BODY void gradient_body(const T* grad, const T* x, const T* out, T* dx, T* dresidual, int64_t residual_width,
                            const int32_t* inverse, int64_t rows, int64_t width, const A* mean, const A* ka,
                            const A* kb, const A* kc, A lowest) {
#define GST_ROWS(kind) \
  gradient_rows<kind>(grad, x, out, dx, dresidual, residual_width, inverse, rows, width, mean, ka, kb, kc, lowest)
  if (!dresidual) GST_ROWS(kNone);
  else if (!inverse) GST_ROWS(kDirect);
  else GST_ROWS(kMapped);
#undef GST_ROWS
}

#define GST_LOOPS(T, A)                                                                                              \
  GST_CLONES void moments(const T* x, int64_t rows, int64_t width, const A* pilot, A* sum, A* sum2) {                \
    moments_body(x, rows, width, pilot, sum, sum2);                                                                  \
  }                                                                                                                  \
  GST_CLONES void apply(const T* x, const T* residual, int64_t residual_width, const int32_t* map, T* out,           \
                        int64_t rows, int64_t width, const A* mean, const A* scale, const A* shift, A lowest,        \
                        A* sum) {                                                                                    \
    apply_body(x, residual, residual_width, map, out, rows, width, mean, scale, shift, lowest, sum);                 \
  }                                                                                                                  \
  GST_CLONES void gradient_sums(const T* grad, const T* x, const T* out, int64_t rows, int64_t width, const A* mean, \
                                A lowest, A* sum, A* sum_x) {                                                        \
    gradient_sums_body(grad, x, out, rows, width, mean, lowest, sum, sum_x);                                         \
  }                                                                                                                  \
  GST_CLONES void gradient(const T* grad, const T* x, const T* out, T* dx, T* dresidual, int64_t residual_width,     \
                           const int32_t* inverse, int64_t rows, int64_t width, const A* mean, const A* ka,          \
                           const A* kb, const A* kc, A lowest) {                                                     \
    gradient_body(grad, x, out, dx, dresidual, residual_width, inverse, rows, width, mean, ka, kb, kc, lowest);      \
  }
GST_LOOPS(float, float)
GST_LOOPS(double, double)
GST_LOOPS(at::BFloat16, float)
#undef GST_LOOPS

// +------------------------------------------------------------------------------------------------------------------+
// | Two layouts, one view: channels-last is rows of c columns, cut into chunks; a plane of NCHW rows of kLanes       |
// +------------------------------------------------------------------------------------------------------------------+

struct Map {
  bool last;  // channels-last
  int64_t n, c, hw;
  Map(const Tensor& x)
      : last(x.suggest_memory_format() == at::MemoryFormat::ChannelsLast), n(x.size(0)), c(x.size(1)),
        hw(x.size(2) * x.size(3)) {}
  at::MemoryFormat format() const { return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous; }
  int64_t columns() const { return last ? c : c * kLanes; }
  int64_t spread() const { return last ? 1 : kLanes; }  // columns of a channel
  int64_t slots() const { return last ? kChunks : 1; }
  double count() const { return static_cast<double>(n) * hw; }
};

struct Piece {
  int64_t slot, offset, rows, width, column, image, channel, pixel;
};

template <typename F>
void for_pieces(const Map& map, const F& f) {
  if (map.c == 0 || map.n * map.hw == 0) return;
  if (map.last) {
    const int64_t rows = map.n * map.hw, chunk = (rows + kChunks - 1) / kChunks;
    at::parallel_for(0, kChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end && k * chunk < rows; ++k)
        f(Piece{k, k * chunk * map.c, std::min(chunk, rows - k * chunk), map.c, 0, 0, 0, k * chunk});
    });
    return;
  }
  at::parallel_for(0, map.c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t ch = begin; ch < end; ++ch)
      for (int64_t image = 0; image < map.n; ++image) {
        const int64_t offset = (image * map.c + ch) * map.hw, whole = map.hw / kLanes * kLanes;
        if (whole) f(Piece{0, offset, whole / kLanes, kLanes, ch * kLanes, image, ch, 0});
        if (whole < map.hw) f(Piece{0, offset + whole, 1, map.hw - whole, ch * kLanes, image, ch, whole});
      }
  });
}

template <typename A>
struct Columns {  // per-channel coefficients, repeated for each column of a channel
  const Map& map;
  std::vector<A> values;
  explicit Columns(const Map& map) : map(map), values(map.columns()) {}
  void set(int64_t channel, double value) {
    for (int64_t i = 0; i < map.spread(); ++i) values[channel * map.spread() + i] = static_cast<A>(value);
  }
  const A* at(const Piece& piece) const { return values.data() + piece.column; }
};

template <typename A>
struct Sums {  // per-column partial sums, added up per channel in a fixed order, in double
  const Map& map;
  std::vector<A> values;
  explicit Sums(const Map& map) : map(map), values(map.slots() * map.columns()) {}
  A* at(const Piece& piece) { return values.data() + piece.slot * map.columns() + piece.column; }
  std::vector<double> totals() const {
    std::vector<double> sums(map.c);
    for (int64_t slot = 0; slot < map.slots(); ++slot)
      for (int64_t i = 0; i < map.columns(); ++i) sums[i / map.spread()] += values[slot * map.columns() + i];
    return sums;
  }
};

std::vector<int64_t> live_filters(const OptTensor& live, int64_t c) {
  std::vector<int64_t> filters(c);
  const Tensor index = live ? live->contiguous() : Tensor();
  for (int64_t i = 0; i < c; ++i) filters[i] = live ? index.const_data_ptr<int64_t>()[i] : i;
  return filters;
}

// residual_map in 32 bits, checked; empty without one.
std::vector<int32_t> source_channels(const OptTensor& residual_map, int64_t channels) {
  if (!residual_map) return {};
  const Tensor index = residual_map->contiguous();
  std::vector<int32_t> sources(index.numel());
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t j = index.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(j < channels, "residual_map points at channel ", j, " of ", channels);
    sources[i] = static_cast<int32_t>(j);
  }
  return sources;
}

template <typename A>
A lowest_value(bool relu) {
  return relu ? A(0) : -std::numeric_limits<A>::infinity();
}

// What a per-filter statistic of all filters becomes: the live ones by value(i), the pruned ones, whose map is zero, as
// if 0 had been seen.
template <typename A, typename F>
void update(const Tensor& statistic, const std::vector<int64_t>& filters, double momentum, const F& value) {
  A* s = statistic.data_ptr<A>();
  std::vector<double> seen(statistic.numel());
  for (size_t i = 0; i < filters.size(); ++i) seen.at(filters[i]) = value(i);
  for (size_t i = 0; i < seen.size(); ++i) s[i] = static_cast<A>(running(s[i], seen[i], momentum));
}

}  // namespace

// +------------------------------------------------------------------------------------------------------------------+
// | The operators                                                                                                    |
// +------------------------------------------------------------------------------------------------------------------+

template <typename T, typename A>
void bn_act_forward(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& running_mean,
                    const Tensor& running_var, const OptTensor& live, const OptTensor& residual,
                    const OptTensor& residual_map, const OptTensor& act, bool training, bool relu, double momentum,
                    double eps, double act_keep, const Tensor& out, const Tensor& mean, const Tensor& invstd) {
  const Map map(x);
  const std::vector<int64_t> filters = live_filters(live, map.c);
  const std::vector<int32_t> sources = source_channels(residual_map, residual ? residual->size(1) : 0);
  const T *px = x.const_data_ptr<T>(), *pr = residual ? residual->const_data_ptr<T>() : nullptr;
  const int64_t residual_width = residual ? residual->size(1) : 0;
  T* po = out.data_ptr<T>();
  A *m = mean.data_ptr<A>(), *is = invstd.data_ptr<A>();

  if (training) {
    std::vector<double> var(map.c);
    Columns<A> pilot(map);
    Sums<A> sum(map), sum2(map);
    for (int64_t i = 0; i < map.c; ++i) pilot.set(i, px[map.last ? i : i * map.hw]);
    for_pieces(map, [&](const Piece& p) {
      moments(px + p.offset, p.rows, p.width, pilot.at(p), sum.at(p), sum2.at(p));
    });
    const std::vector<double> totals = sum.totals(), totals2 = sum2.totals();
    for (int64_t i = 0; i < map.c; ++i) {
      const BnMoments b = bn_moments(totals[i], totals2[i], pilot.values[i * map.spread()], map.count(), eps);
      m[i] = b.mean, is[i] = b.invstd, var[i] = b.var;
    }
    update<A>(running_mean, filters, momentum, [&](size_t i) { return m[i]; });
    update<A>(running_var, filters, momentum, [&](size_t i) { return unbiased(var[i], map.count()); });
  } else {
    for (int64_t i = 0; i < map.c; ++i) {
      m[i] = running_mean.const_data_ptr<A>()[filters[i]];
      is[i] = 1 / std::sqrt(running_var.const_data_ptr<A>()[filters[i]] + eps);
    }
  }

  Columns<A> center(map), scale(map), shift(map);
  for (int64_t i = 0; i < map.c; ++i) {
    center.set(i, m[i]);
    scale.set(i, gamma.const_data_ptr<A>()[filters[i]] * static_cast<double>(is[i]));
    shift.set(i, beta.const_data_ptr<A>()[filters[i]]);
  }
  std::optional<Sums<A>> magnitude;
  if (act) magnitude.emplace(map);
  for_pieces(map, [&](const Piece& p) {
    const T* r = pr;
    if (pr && map.last) {
      r += p.pixel * residual_width;
    } else if (pr) {
      const int64_t source = sources.empty() ? p.channel : sources[p.channel];
      r = source < 0 ? nullptr : r + (p.image * residual_width + source) * map.hw + p.pixel;
    }
    apply(px + p.offset, r, map.last ? residual_width : p.width, map.last && residual_map ? sources.data() : nullptr,
          po + p.offset, p.rows, p.width, center.at(p), scale.at(p), shift.at(p), lowest_value<A>(relu),
          act ? magnitude->at(p) : nullptr);
  });
  if (!act) return;
  const std::vector<double> totals = magnitude->totals();
  update<float>(*act, filters, 1 - act_keep, [&](size_t i) { return totals[i] / map.count(); });
}

std::tuple<Tensor, Tensor, Tensor> bn_act_cpu(
    const Tensor& x_in, const Tensor& gamma, const Tensor& beta, const Tensor& running_mean, const Tensor& running_var,
    const OptTensor& live, const OptTensor& residual_in, const OptTensor& residual_map, const OptTensor& act_in,
    const OptTensor& measure, bool training, bool relu, double momentum, double eps, double act_keep) {
  check_bn_act(x_in, gamma, beta, running_mean, running_var, live, residual_in, residual_map, act_in, measure,
               training);
  const auto format = x_in.suggest_memory_format();
  const Tensor x = x_in.contiguous(format);
  const OptTensor residual = residual_in ? OptTensor(residual_in->contiguous(format)) : std::nullopt;
  const bool measured = act_in && (!measure || measure->item<bool>());
  const OptTensor act = measured ? act_in : std::nullopt;
  const Tensor out = at::empty_like(x);
  const Tensor mean = at::empty({x.size(1)}, gamma.options()), invstd = at::empty_like(mean);
  const auto call = [&](auto t, auto a) {
    bn_act_forward<decltype(t), decltype(a)>(x, gamma, beta, running_mean, running_var, live, residual, residual_map,
                                             act, training, relu, momentum, eps, act_keep, out, mean, invstd);
  };
  if (x.scalar_type() == at::kDouble) call(double(), double());
  else if (x.scalar_type() == at::kFloat) call(float(), float());
  else call(at::BFloat16(), float());
  return {out, mean, invstd};
}

template <typename T, typename A>
void bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& out, const Tensor& gamma, const Tensor& mean,
                     const Tensor& invstd, const OptTensor& live, const OptTensor& residual_map, bool training,
                     bool relu, const Tensor& dx, const Tensor& dgamma, const Tensor& dbeta, const Tensor& dresidual) {
  const Map map(x);
  const std::vector<int64_t> filters = live_filters(live, map.c);
  const int64_t residual_width = dresidual.defined() ? dresidual.size(1) : 0;
  const std::vector<int32_t> sources = source_channels(residual_map, residual_width);
  std::vector<int32_t> inverse(residual_map ? residual_width : 0, -1);
  for (size_t i = 0; i < sources.size(); ++i)
    if (sources[i] >= 0) inverse[sources[i]] = static_cast<int32_t>(i);
  const A lowest = lowest_value<A>(relu);
  const T *pg = grad.const_data_ptr<T>(), *px = x.const_data_ptr<T>(), *po = out.const_data_ptr<T>();
  T *pd = dx.data_ptr<T>(), *pr = dresidual.defined() ? dresidual.data_ptr<T>() : nullptr;

  Columns<A> center(map), ka(map), kb(map), kc(map);
  Sums<A> sum(map), sum_x(map);
  for (int64_t i = 0; i < map.c; ++i) center.set(i, mean.const_data_ptr<A>()[i]);
  for_pieces(map, [&](const Piece& p) {
    gradient_sums(pg + p.offset, px + p.offset, po + p.offset, p.rows, p.width, center.at(p), lowest, sum.at(p),
                  sum_x.at(p));
  });
  const std::vector<double> totals = sum.totals(), totals_x = sum_x.totals();
  for (int64_t i = 0; i < map.c; ++i) {
    const double g = totals[i], gx = totals_x[i], s = invstd.const_data_ptr<A>()[i];
    dbeta.data_ptr<A>()[filters[i]] = g;
    dgamma.data_ptr<A>()[filters[i]] = gx * s;
    const BnGradient k = bn_gradient(g, gx, gamma.const_data_ptr<A>()[filters[i]], s, map.count(), training);
    ka.set(i, k.ka), kb.set(i, k.kb), kc.set(i, k.kc);
  }
  for_pieces(map, [&](const Piece& p) {
    T* r = pr;
    if (pr && map.last) {
      r += p.pixel * residual_width;
    } else if (pr) {
      const int64_t source = residual_map ? sources[p.channel] : p.channel;
      r = source < 0 ? nullptr : r + (p.image * residual_width + source) * map.hw + p.pixel;
    }
    gradient(pg + p.offset, px + p.offset, po + p.offset, pd + p.offset, r, map.last ? residual_width : p.width,
             map.last && residual_map ? inverse.data() : nullptr, p.rows, p.width, center.at(p), ka.at(p), kb.at(p),
             kc.at(p), lowest);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cpu(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& out_in, const Tensor& gamma, const Tensor& mean,
    const Tensor& invstd, const OptTensor& live, const OptTensor& residual_map, int64_t residual_channels,
    bool training, bool relu) {
  check_bn_act_backward(grad_in, x_in, out_in, gamma, mean, invstd, live, residual_map);
  const auto format = x_in.suggest_memory_format();
  const Tensor grad = grad_in.contiguous(format), x = x_in.contiguous(format), out = out_in.contiguous(format);
  const Tensor dx = at::empty_like(x), dgamma = at::zeros_like(gamma), dbeta = at::zeros_like(gamma);
  Tensor dresidual;
  if (residual_channels >= 0) {  // channels-last writes every entry, NCHW only the planes that are mapped to
    dresidual = at::empty({x.size(0), residual_channels, x.size(2), x.size(3)}, x.options().memory_format(format));
    if (residual_map) dresidual.zero_();
  }
  const auto call = [&](auto t, auto a) {
    bn_act_backward<decltype(t), decltype(a)>(grad, x, out, gamma, mean, invstd, live, residual_map, training, relu,
                                              dx, dgamma, dbeta, dresidual);
  };
  if (x.scalar_type() == at::kDouble) call(double(), double());
  else if (x.scalar_type() == at::kFloat) call(float(), float());
  else call(at::BFloat16(), float());
  return {dx, dgamma, dbeta, dresidual.defined() ? dresidual : at::empty({0}, x.options())};
}

TORCH_LIBRARY_IMPL(gst, CPU, m) {
  m.impl("bn_act", bn_act_cpu);
  m.impl("bn_act_backward", bn_act_backward_cpu);
}

}  // namespace gst
