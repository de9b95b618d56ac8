// Batch norm + shortcut + mean |a| + ReLU on the CPU: two passes over the data forward, two backward.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "../gst_math.h"
#include "clones.h"

namespace gst {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kLanes = 16;  // columns of a plane in NCHW: one AVX-512 vector of float
constexpr int64_t kBits = 32;   // rows of a word of the gate, which has one for each column
constexpr int kWindow = 4;      // rows of a pooling window
// Rows are summed in at most kSlots chunks of at least kChunk: by their number alone, not by that of the threads.
constexpr int64_t kSlots = 64, kChunk = 64;

// +------------------------------------------------------------------------------------------------------------------+
// | The loops, over rows of `width` columns; each column has its own coefficients and sums. One row after the other: |
// | several at a time would load those less often, but were up to half as fast, as processors prefetch one stream    |
// +------------------------------------------------------------------------------------------------------------------+

enum Shortcut { kNone, kDirect, kMapped };

// Rows that follow one another; or, with a pair (of image lines: so many rows), those of a max-pool's 2x2 windows,
// window by window, kWindow to each, `first` the number of the first of them in the whole map.
struct Rows {
  int64_t count, width, first, pair;
};

// From a window's first row to row k; `line` is from its upper line to its lower.
GST_BODY int64_t to_row(int k, int64_t width, int64_t line) { return (k & 1) * width + (k >> 1) * line; }

template <typename T, typename A>
GST_BODY void moments_body(const T* __restrict x, int64_t rows, int64_t width, const A* __restrict pilot,
                           A* __restrict sum, A* __restrict sum2) {
  for (int64_t r = 0; r < rows; ++r, x += width)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const A a = A(x[i]) - pilot[i];
      sum[i] += a;
      sum2[i] += a * a;
    }
}

// Calls step(r, offset in the map, offset in the pooled map) for each row, or for each window's first.
template <bool pool, typename F>
GST_BODY void for_rows(const Rows& rows, const F& step) {
  const int64_t windows = rows.pair / kWindow;
  for (int64_t r = 0; r < rows.count; r += pool ? kWindow : 1) {
    const int64_t window = (rows.first + r) / kWindow;
    if constexpr (pool)
      step(r, (window / windows * rows.pair + window % windows * 2) * rows.width, window * rows.width);
    else
      step(r, r * rows.width, r * rows.width);
  }
}

template <Shortcut kind, bool measure, bool pool, typename T, typename A>
GST_BODY void apply_row(const T* __restrict x, int64_t line, const T* __restrict residual,
                        const int32_t* __restrict map, T* __restrict out, uint32_t* __restrict gate, int64_t bit,
                        int64_t width, const A* __restrict mean, const A* __restrict scale,
                        const A* __restrict shift, A lowest, A* __restrict sum) {
  const uint32_t keep = bit ? ~0u : 0u;  // the gate's memory is as it was found
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits = gate[i] & keep, best = 0;
    A magnitude = 0, top = 0;
#pragma GCC unroll 4
    for (int k = 0; k < (pool ? kWindow : 1); ++k) {
      A a = bn_value(A(x[to_row(k, width, line) + i]), mean[i], scale[i], shift[i]);
      if constexpr (kind == kDirect) a += A(residual[i]);
      if constexpr (kind == kMapped) a += map[i] < 0 ? A(0) : A(residual[map[i]]);
      if constexpr (measure) magnitude += std::fabs(a);
      if constexpr (pool) {  // the first of the largest, as max_pool2d has it, or the last that is no number
        a = A(T(a));
        const bool better = k == 0 || (a > top) | (a != a);
        top = better ? a : top;
        best = better ? 1u << (bit + k) : best;
      } else {
        bits |= act_passes(a, lowest) ? 1u << (bit + k) : 0u;
        out[i] = T(act_value(a, lowest));
      }
    }
    if constexpr (pool) {
      bits |= act_passes(top, lowest) ? best : 0u;
      out[i] = T(act_value(top, lowest));
    }
    if constexpr (measure) sum[i] += magnitude;
    gate[i] = bits;
  }
}

template <Shortcut kind, bool measure, bool pool, typename T, typename A>
GST_BODY void apply_all(const T* x, const T* residual, int64_t residual_width, const int32_t* map, T* out,
                        uint32_t* gate, const Rows& rows, const A* mean, const A* scale, const A* shift, A lowest,
                        A* sum) {
  const int64_t width = rows.width;
  for_rows<pool>(rows, [&](int64_t r, int64_t at, int64_t at_out) __attribute__((always_inline)) {
    apply_row<kind, measure, pool>(x + at, rows.pair / 2 * width, residual + r * residual_width, map, out + at_out,
                                    gate + r / kBits * width, r % kBits, width, mean, scale, shift, lowest, sum);
  });
}

template <typename T, typename A>
GST_BODY void apply_body(const T* x, const T* residual, int64_t residual_width, const int32_t* map, T* out,
                         uint32_t* gate, const Rows& rows, const A* mean, const A* scale, const A* shift, A lowest,
                         A* sum) {
#define GST_ROWS(kind, pool)                                                                                         \
  (sum ? apply_all<kind, true, pool>(x, residual, residual_width, map, out, gate, rows, mean, scale, shift, lowest,  \
                                     sum)                                                                            \
       : apply_all<kind, false, pool>(x, residual, residual_width, map, out, gate, rows, mean, scale, shift, lowest, \
                                      sum))
  if (rows.pair) GST_ROWS(kNone, true);
  else if (!residual) GST_ROWS(kNone, false);
  else if (!map) GST_ROWS(kDirect, false);
  else GST_ROWS(kMapped, false);
#undef GST_ROWS
}

template <bool pool, typename T, typename A>
GST_BODY void gradient_sums_row(const T* __restrict grad, const T* __restrict x, int64_t line,
                                const uint32_t* __restrict gate, int64_t bit, int64_t width,
                                const A* __restrict mean, A* __restrict sum, A* __restrict sum_x) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    A s = 0, sx = 0;
#pragma GCC unroll 4
    for (int k = 0; k < (pool ? kWindow : 1); ++k) {
      const A g = gate[i] & 1u << (bit + k) ? A(grad[i]) : A(0);
      s += g;
      sx += g * (A(x[to_row(k, width, line) + i]) - mean[i]);
    }
    sum[i] += s;
    sum_x[i] += sx;
  }
}

template <bool pool, typename T, typename A>
GST_BODY void gradient_sums_all(const T* grad, const T* x, const uint32_t* gate, const Rows& rows, const A* mean,
                                A* sum, A* sum_x) {
  const int64_t width = rows.width;
  for_rows<pool>(rows, [&](int64_t r, int64_t at, int64_t at_grad) __attribute__((always_inline)) {
    gradient_sums_row<pool>(grad + at_grad, x + at, rows.pair / 2 * width, gate + r / kBits * width, r % kBits, width,
                             mean, sum, sum_x);
  });
}

template <Shortcut kind, bool pool, typename T, typename A>
GST_BODY void gradient_row(const T* __restrict grad, const T* __restrict x, int64_t line,
                           const uint32_t* __restrict gate, int64_t bit, T* __restrict dx, T* __restrict dresidual,
                           int64_t residual_width, const int32_t* __restrict inverse, int64_t width,
                           const A* __restrict mean, const A* __restrict ka, const A* __restrict kb,
                           const A* __restrict kc) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < (pool ? kWindow : 1); ++k) {
      const A g = gate[i] & 1u << (bit + k) ? A(grad[i]) : A(0);
      const A value = A(x[to_row(k, width, line) + i]);
      dx[to_row(k, width, line) + i] = T(bn_dx(g, value, mean[i], ka[i], kb[i], kc[i]));
      if constexpr (kind == kDirect) dresidual[i] = T(g);
    }
  if constexpr (kind == kMapped)
#pragma GCC ivdep
    for (int64_t j = 0; j < residual_width; ++j) {
      const int32_t i = inverse[j];
      dresidual[j] = i >= 0 && gate[i] & 1u << bit ? grad[i] : T(0);
    }
}

template <Shortcut kind, bool pool, typename T, typename A>
GST_BODY void gradient_all(const T* grad, const T* x, const uint32_t* gate, T* dx, T* dresidual,
                           int64_t residual_width, const int32_t* inverse, const Rows& rows, const A* mean,
                           const A* ka, const A* kb, const A* kc) {
  const int64_t width = rows.width;
  for_rows<pool>(rows, [&](int64_t r, int64_t at, int64_t at_grad) __attribute__((always_inline)) {
    gradient_row<kind, pool>(grad + at_grad, x + at, rows.pair / 2 * width, gate + r / kBits * width, r % kBits,
                              dx + at, dresidual + r * residual_width, residual_width, inverse, width, mean, ka, kb,
                              kc);
  });
}

template <typename T, typename A>
GST_BODY void gradient_body(const T* grad, const T* x, const uint32_t* gate, T* dx, T* dresidual,
                            int64_t residual_width, const int32_t* inverse, const Rows& rows, const A* mean,
                            const A* ka, const A* kb, const A* kc) {
#define GST_ROWS(kind, pool) \
  gradient_all<kind, pool>(grad, x, gate, dx, dresidual, residual_width, inverse, rows, mean, ka, kb, kc)
  if (rows.pair) GST_ROWS(kNone, true);
  else if (!dresidual) GST_ROWS(kNone, false);
  else if (!inverse) GST_ROWS(kDirect, false);
  else GST_ROWS(kMapped, false);
#undef GST_ROWS
}

// Adds each slot's sums to the totals, in order.
template <typename A>
GST_BODY void add_slots_body(const A* __restrict values, int64_t slots, int64_t columns, double* __restrict totals) {
  for (int64_t slot = 0; slot < slots; ++slot, values += columns)
    for (int64_t i = 0; i < columns; ++i) totals[i] += values[i];
}

#define GST_LOOPS(T, A)                                                                                              \
  GST_CLONES void moments(const T* x, int64_t rows, int64_t width, const A* pilot, A* sum, A* sum2) {                \
    moments_body(x, rows, width, pilot, sum, sum2);                                                                  \
  }                                                                                                                  \
  GST_CLONES void apply(const T* x, const T* residual, int64_t residual_width, const int32_t* map, T* out,           \
                        uint32_t* gate, const Rows& rows, const A* mean, const A* scale, const A* shift,             \
                        A lowest, A* sum) {                                                                          \
    apply_body(x, residual, residual_width, map, out, gate, rows, mean, scale, shift, lowest, sum);                  \
  }                                                                                                                  \
  GST_CLONES void gradient_sums(const T* grad, const T* x, const uint32_t* gate, const Rows& rows, const A* mean,    \
                                A* sum, A* sum_x) {                                                                  \
    rows.pair ? gradient_sums_all<true>(grad, x, gate, rows, mean, sum, sum_x)                                       \
              : gradient_sums_all<false>(grad, x, gate, rows, mean, sum, sum_x);                                     \
  }                                                                                                                  \
  GST_CLONES void gradient(const T* grad, const T* x, const uint32_t* gate, T* dx, T* dresidual,                     \
                           int64_t residual_width, const int32_t* inverse, const Rows& rows, const A* mean,          \
                           const A* ka, const A* kb, const A* kc) {                                                  \
    gradient_body(grad, x, gate, dx, dresidual, residual_width, inverse, rows, mean, ka, kb, kc);                    \
  }
GST_LOOPS(float, float)
GST_LOOPS(double, double)
GST_LOOPS(at::BFloat16, float)
#undef GST_LOOPS

GST_CLONES void add_slots(const float* values, int64_t slots, int64_t columns, double* totals) {
  add_slots_body(values, slots, columns, totals);
}
GST_CLONES void add_slots(const double* values, int64_t slots, int64_t columns, double* totals) {
  add_slots_body(values, slots, columns, totals);
}

// +------------------------------------------------------------------------------------------------------------------+
// | Two layouts, one view: channels-last is rows of c columns, cut into chunks; a plane of NCHW rows of kLanes       |
// +------------------------------------------------------------------------------------------------------------------+

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Piece {
  int64_t slot, offset, word, rows, width, column, image, channel, pixel;
};

struct Map {
  bool last;  // channels-last
  int64_t n, c, hw, w;
  Map(const Tensor& x, bool pool)
      : last(pool || x.suggest_memory_format() == at::MemoryFormat::ChannelsLast), n(x.size(0)), c(x.size(1)),
        hw(x.size(2) * x.size(3)), w(x.size(3)) {}
  int64_t columns() const { return last ? c : c * kLanes; }
  int64_t spread() const { return last ? 1 : kLanes; }  // columns of a channel
  int64_t chunk() const { return std::max(kChunk, divide_up(divide_up(n * hw, kSlots), kBits) * kBits); }  // rows
  int64_t slots() const { return last ? divide_up(n * hw, chunk()) : 1; }
  int64_t plane_words() const { return divide_up(hw / kLanes, kBits) * kLanes + hw % kLanes; }
  int64_t words() const { return last ? divide_up(n * hw, kBits) * c : n * c * plane_words(); }  // of the gate
  Rows rows(const Piece& piece, bool pool) const { return {piece.rows, piece.width, piece.pixel, pool ? 2 * w : 0}; }
  double count() const { return static_cast<double>(n) * hw; }
};

// Calls f for all pieces, each thread for its own; backward, from the last to the first, so that the second pass over
// a map begins with what the first has left in the caches.
template <typename F>
void for_pieces(const Map& map, bool backward, const F& f) {
  if (map.c == 0 || map.n * map.hw == 0) return;
  const auto each = [&](int64_t begin, int64_t end, const auto& g) {
    for (int64_t i = begin; i < end; ++i) g(backward ? end - 1 - (i - begin) : i);
  };
  if (map.last) {
    const int64_t rows = map.n * map.hw, chunk = map.chunk();
    at::parallel_for(0, map.slots(), 1, [&](int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t k) {
        f(Piece{k, k * chunk * map.c, k * chunk / kBits * map.c, std::min(chunk, rows - k * chunk), map.c, 0, 0, 0,
                k * chunk});
      });
    });
    return;
  }
  at::parallel_for(0, map.c, 1, [&](int64_t begin, int64_t end) {
    each(begin, end, [&](int64_t ch) {
      each(0, map.n, [&](int64_t image) {
        const int64_t plane = image * map.c + ch, whole = map.hw / kLanes * kLanes, tail = map.hw - whole;
        const int64_t word = plane * map.plane_words();
        if (whole) f(Piece{0, plane * map.hw, word, whole / kLanes, kLanes, ch * kLanes, image, ch, 0});
        if (tail) f(Piece{0, plane * map.hw + whole, word + map.plane_words() - tail, 1, tail, ch * kLanes, image, ch,
                          whole});
      });
    });
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
    std::vector<double> sums(map.c), columns(map.columns());
    add_slots(values.data(), map.slots(), map.columns(), columns.data());
    for (int64_t i = 0, column = 0; i < map.c; ++i)
      for (int64_t k = 0; k < map.spread(); ++k, ++column) sums[i] += columns[column];
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
  std::vector<bool> taken(channels);
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t j = index.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(j < channels, "residual_map points at channel ", j, " of ", channels);
    TORCH_CHECK_INDEX(j < 0 || !taken[j], "residual_map points at channel ", j, " twice");
    if (j >= 0) taken[j] = true;
    sources[i] = static_cast<int32_t>(j);
  }
  return sources;
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
                    const OptTensor& residual_map, const OptTensor& act, bool training, bool relu, bool pool,
                    double momentum, double eps, double act_keep, const OptTensor& bias, const Tensor& out,
                    const Tensor& mean, const Tensor& invstd, const Tensor& gate) {
  const Map map(x, pool);
  const std::vector<int64_t> filters = live_filters(live, map.c);
  const std::vector<int32_t> sources = source_channels(residual_map, residual ? residual->size(1) : 0);
  const T *px = x.const_data_ptr<T>(), *pr = residual ? residual->const_data_ptr<T>() : nullptr;
  const int64_t residual_width = residual ? residual->size(1) : 0;
  T* po = out.data_ptr<T>();
  uint32_t* pgate = reinterpret_cast<uint32_t*>(gate.data_ptr<int32_t>());
  A *m = mean.data_ptr<A>(), *is = invstd.data_ptr<A>();
  const auto left_out = [&](size_t i) { return bias ? double(bias->const_data_ptr<A>()[filters[i]]) : 0; };

  if (training) {
    std::vector<double> var(map.c);
    Columns<A> pilot(map);
    Sums<A> sum(map), sum2(map);
    for (int64_t i = 0; i < map.c; ++i) pilot.set(i, bn_pilot(A(px[map.last ? i : i * map.hw])));
    for_pieces(map, false, [&](const Piece& p) {
      moments(px + p.offset, p.rows, p.width, pilot.at(p), sum.at(p), sum2.at(p));
    });
    const std::vector<double> totals = sum.totals(), totals2 = sum2.totals();
    for (int64_t i = 0; i < map.c; ++i) {
      const BnMoments b = bn_moments(totals[i], totals2[i], pilot.values[i * map.spread()], map.count(), eps);
      m[i] = b.mean, is[i] = b.invstd, var[i] = b.var;
    }
    update<A>(running_mean, filters, momentum, [&](size_t i) { return m[i] + left_out(i); });
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
    shift.set(i, beta.const_data_ptr<A>()[filters[i]] + 0 * left_out(i));  // where it is no number, nor is the map
  }
  std::optional<Sums<A>> magnitude;
  if (act) magnitude.emplace(map);
  for_pieces(map, training, [&](const Piece& p) {
    const T* r = pr;
    if (pr && map.last) {
      r += p.pixel * residual_width;
    } else if (pr) {
      const int64_t source = sources.empty() ? p.channel : sources[p.channel];
      r = source < 0 ? nullptr : r + (p.image * residual_width + source) * map.hw + p.pixel;
    }
    const int64_t offset = pool ? 0 : p.offset;  // pooling rows are counted from the map's first
    apply(px + offset, r, map.last ? residual_width : p.width, map.last && residual_map ? sources.data() : nullptr,
          po + offset, pgate + p.word, map.rows(p, pool), center.at(p),
          scale.at(p), shift.at(p), lowest_value<A>(relu), act ? magnitude->at(p) : nullptr);
  });
  if (!act) return;
  const std::vector<double> totals = magnitude->totals();
  update<float>(*act, filters, 1 - act_keep, [&](size_t i) { return totals[i] / map.count(); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_cpu(
    const Tensor& x_in, const Tensor& gamma, const Tensor& beta, const Tensor& running_mean, const Tensor& running_var,
    const OptTensor& live, const OptTensor& residual_in, const OptTensor& residual_map, const OptTensor& act_in,
    const OptTensor& measure, bool training, bool relu, bool pool, double momentum, double eps, double act_keep,
    const OptTensor& bias) {
  check_bn_act(x_in, gamma, beta, running_mean, running_var, live, residual_in, residual_map, act_in, measure,
               training, pool, bias);
  const auto format = pool ? at::MemoryFormat::ChannelsLast : x_in.suggest_memory_format();
  const Tensor x = x_in.contiguous(format);
  const OptTensor residual = residual_in ? OptTensor(residual_in->contiguous(format)) : std::nullopt;
  const bool measured = act_in && (!measure || measure->item<bool>());
  const OptTensor act = measured ? act_in : std::nullopt;
  const Tensor out = at::empty({x.size(0), x.size(1), x.size(2) / (pool ? 2 : 1), x.size(3) / (pool ? 2 : 1)},
                               x.options().memory_format(format));
  const Tensor mean = at::empty({x.size(1)}, gamma.options()), invstd = at::empty_like(mean);
  const Tensor gate = at::empty({Map(x, pool).words()}, x.options().dtype(at::kInt));
  const auto call = [&](auto t, auto a) {
    bn_act_forward<decltype(t), decltype(a)>(x, gamma, beta, running_mean, running_var, live, residual, residual_map,
                                             act, training, relu, pool, momentum, eps, act_keep, bias, out, mean,
                                             invstd, gate);
  };
  if (x.scalar_type() == at::kDouble) call(double(), double());
  else if (x.scalar_type() == at::kFloat) call(float(), float());
  else call(at::BFloat16(), float());
  return {out, mean, invstd, gate};
}

template <typename T, typename A>
void bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& gate, const Tensor& gamma, const Tensor& mean,
                     const Tensor& invstd, const OptTensor& live, const OptTensor& residual_map, bool training,
                     bool pool, const Tensor& dx, const Tensor& dgamma, const Tensor& dbeta, const Tensor& dresidual) {
  const Map map(x, pool);
  const std::vector<int64_t> filters = live_filters(live, map.c);
  const int64_t residual_width = dresidual.defined() ? dresidual.size(1) : 0;
  const std::vector<int32_t> sources = source_channels(residual_map, residual_width);
  std::vector<int32_t> inverse(residual_map ? residual_width : 0, -1);
  for (size_t i = 0; i < sources.size(); ++i)
    if (sources[i] >= 0) inverse[sources[i]] = static_cast<int32_t>(i);
  const T *pg = grad.const_data_ptr<T>(), *px = x.const_data_ptr<T>();
  const uint32_t* pgate = reinterpret_cast<const uint32_t*>(gate.const_data_ptr<int32_t>());
  T *pd = dx.data_ptr<T>(), *pr = dresidual.defined() ? dresidual.data_ptr<T>() : nullptr;

  Columns<A> center(map), ka(map), kb(map), kc(map);
  Sums<A> sum(map), sum_x(map);
  for (int64_t i = 0; i < map.c; ++i) center.set(i, mean.const_data_ptr<A>()[i]);
  for_pieces(map, false, [&](const Piece& p) {
    const int64_t offset = pool ? 0 : p.offset;
    gradient_sums(pg + offset, px + offset, pgate + p.word, map.rows(p, pool), center.at(p), sum.at(p), sum_x.at(p));
  });
  const std::vector<double> totals = sum.totals(), totals_x = sum_x.totals();
  for (int64_t i = 0; i < map.c; ++i) {
    const double g = totals[i], gx = totals_x[i], s = invstd.const_data_ptr<A>()[i];
    dbeta.data_ptr<A>()[filters[i]] = g;
    dgamma.data_ptr<A>()[filters[i]] = gx * s;
    const BnGradient k = bn_gradient(g, gx, gamma.const_data_ptr<A>()[filters[i]], s, map.count(), training);
    ka.set(i, k.ka), kb.set(i, k.kb), kc.set(i, k.kc);
  }
  for_pieces(map, true, [&](const Piece& p) {
    T* r = pr;
    if (pr && map.last) {
      r += p.pixel * residual_width;
    } else if (pr) {
      const int64_t source = residual_map ? sources[p.channel] : p.channel;
      r = source < 0 ? nullptr : r + (p.image * residual_width + source) * map.hw + p.pixel;
    }
    const int64_t offset = pool ? 0 : p.offset;
    gradient(pg + offset, px + offset, pgate + p.word, pd + offset, r,
             map.last ? residual_width : p.width, map.last && residual_map ? inverse.data() : nullptr,
             map.rows(p, pool), center.at(p), ka.at(p), kb.at(p), kc.at(p));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cpu(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& gate, const Tensor& gamma, const Tensor& mean,
    const Tensor& invstd, const OptTensor& live, const OptTensor& residual_map, int64_t residual_channels,
    bool training, bool, bool pool) {
  check_bn_act_backward(grad_in, x_in, gamma, mean, invstd, live, residual_map, residual_channels, pool);
  const auto format = pool ? at::MemoryFormat::ChannelsLast : x_in.suggest_memory_format();
  const Tensor grad = grad_in.contiguous(format), x = x_in.contiguous(format), dx = at::empty_like(x);
  check_gate(gate, x, at::kInt, Map(x, pool).words());
  const Tensor dgamma = live ? at::zeros_like(gamma) : at::empty_like(gamma), dbeta = dgamma.clone();
  Tensor dresidual;
  if (residual_channels >= 0) {  // channels-last writes every entry, NCHW only the planes that are mapped to
    dresidual = at::empty({x.size(0), residual_channels, x.size(2), x.size(3)}, x.options().memory_format(format));
    if (residual_map) dresidual.zero_();
  }
  const auto call = [&](auto t, auto a) {
    bn_act_backward<decltype(t), decltype(a)>(grad, x, gate, gamma, mean, invstd, live, residual_map, training, pool,
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
