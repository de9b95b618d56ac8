// 3x3 convolutions of stride 1 and padding 1 in float32 by Winograd's minimal filtering (Lavin and Gray 2015): a tile
// of 2x2 results takes 16 products per input channel and filter in place of 36; one that is the whole map takes 9.
//     Y = A'[(G w G') . (B' x B)]A,  dx: the same, filters flipped and transposed,  dw = G'[(A dY A') . (B' x B)]G,
// the dot summed over channels, or for dw over tiles: one matrix product for each of the points of a tile. Blocks of
// tiles are so small that what becomes of them stays in a core's cache between the transforms and the products.
// F(2x2,3x3) multiplies by 0, 1 and 1/2 only, so it is as accurate as the direct sum; larger tiles are not.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.h"

namespace gst {
namespace {

using at::Tensor;

constexpr int64_t kLanes = 16, kPanel = 32;  // channels: of a vector, and of the matrices' panels, (..., rows, 32)
constexpr int64_t kRows = 8;                 // by kPanel: the part of a product that the registers hold
constexpr int64_t kForwardBytes = 512 << 10, kGradientBytes = 8 << 20;  // of transformed data: half an L2, part of L3
constexpr auto kLast = at::MemoryFormat::ChannelsLast;

typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));  // several registers on smaller CPUs

GST_BODY Vec& at_address(const float* p) { return *reinterpret_cast<Vec*>(const_cast<float*>(p)); }

// +------------------------------------------------------------------------------------------------------------------+
// | The transforms of one dimension, and their transposes                                                            |
// +------------------------------------------------------------------------------------------------------------------+

struct Tiles {  // F(2,3): two results of a longer row from four values
  static constexpr int points = 4, taken = 4, before = 1;
  GST_BODY void data(const Vec* d, Vec* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  GST_BODY void filter(const Vec* g, Vec* u) {
    const Vec even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  GST_BODY void result(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  GST_BODY void filter_transposed(const Vec* u, Vec* g) {
    const Vec even = (u[1] + u[2]) * 0.5f;
    g[0] = u[0] + even;
    g[1] = (u[1] - u[2]) * 0.5f;
    g[2] = u[3] + even;
  }
  GST_BODY void result_transposed(const Vec* y, Vec* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
};

struct WholeMap {  // a row of two, zeros around it: y0 = g1 (d0 + d1) + (g2 - g1) d1, y1 = g1 (d0 + d1) + (g0 - g1) d0
  static constexpr int points = 3, taken = 2, before = 0;
  GST_BODY void data(const Vec* d, Vec* v) {
    v[0] = d[0];
    v[1] = d[0] + d[1];
    v[2] = d[1];
  }
  GST_BODY void filter(const Vec* g, Vec* u) {
    u[0] = g[0] - g[1];
    u[1] = g[1];
    u[2] = g[2] - g[1];
  }
  GST_BODY void result(const Vec* m, Vec* y) {
    y[0] = m[1] + m[2];
    y[1] = m[1] + m[0];
  }
  GST_BODY void filter_transposed(const Vec* u, Vec* g) {
    g[0] = u[0];
    g[1] = u[1] - u[0] - u[2];
    g[2] = u[2];
  }
  GST_BODY void result_transposed(const Vec* y, Vec* m) {
    m[0] = y[1];
    m[1] = y[0] + y[1];
    m[2] = y[0];
  }
};

template <auto transform, int in, int out>
GST_BODY void both_ways(const Vec* x, Vec* y) {  // x (in, in), y (out, out)
  Vec half[in * out];
#pragma GCC unroll 4
  for (int i = 0; i < in; ++i) transform(x + i * in, half + i * out);
#pragma GCC unroll 4
  for (int j = 0; j < out; ++j) {
    Vec column[in], found[out];
#pragma GCC unroll 4
    for (int i = 0; i < in; ++i) column[i] = half[i * out + j];
    transform(column, found);
#pragma GCC unroll 4
    for (int i = 0; i < out; ++i) y[i * out + j] = found[i];
  }
}

// +------------------------------------------------------------------------------------------------------------------+
// | Maps and tiles: to the points and back                                                                           |
// +------------------------------------------------------------------------------------------------------------------+

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool whole_map(int64_t h, int64_t w) { return h <= 2 && w <= 2; }

int64_t points_of(bool whole) { return whole ? WholeMap::points * WholeMap::points : Tiles::points * Tiles::points; }

struct Map {  // channels-last
  const float* data;
  int64_t c, h, w, tile_rows, tile_columns, tiles;
  int64_t last;             // the offset of the last pixel
  std::vector<float> edge;  // zeros, for what lies outside, and the last pixel: here whole vectors of it may be read
  explicit Map(const Tensor& x)
      : data(x.const_data_ptr<float>()), c(x.size(1)), h(x.size(2)), w(x.size(3)), tile_rows((h + 1) / 2),
        tile_columns((w + 1) / 2), tiles(x.size(0) * tile_rows * tile_columns), last(x.numel() - c),
        edge(2 * round_up(c, kLanes)) {
    std::copy_n(data + last, c, edge.end() - round_up(c, kLanes));
  }
};

struct Place {  // of a tile
  int64_t image, y, x;
  Place(const Map& map, int64_t tile)
      : image(tile / (map.tile_rows * map.tile_columns)), y(2 * (tile / map.tile_columns % map.tile_rows)),
        x(2 * (tile % map.tile_columns)) {}
};

GST_BODY int64_t offset(const Map& map, int64_t image, int64_t y, int64_t x) {  // -1: outside
  return y < 0 || x < 0 || y >= map.h || x >= map.w ? -1 : ((image * map.h + y) * map.w + x) * map.c;
}

GST_BODY const float* pixel(const Map& map, int64_t image, int64_t y, int64_t x) {
  const int64_t at = offset(map, image, y, x), width = round_up(map.c, kLanes);
  return at < 0 ? map.edge.data() : at == map.last ? map.edge.data() + width : map.data + at;
}

// v (points, panels, rows, 32), its first `count` rows, from the tiles of `first` on. Channels that fill up a vector
// hold whatever is next in memory: no product lets them into a result that is kept.
template <auto transform, int taken, int before, int points>
GST_BODY void take_tiles(const Map& map, int64_t first, int64_t count, int64_t rows, float* v) {
  const int64_t point = round_up(map.c, kPanel) * rows;
  for (int64_t t = 0; t < count; ++t) {
    const Place at(map, first + t);
    const float* from[taken * taken];
    for (int i = 0; i < taken * taken; ++i)
      from[i] = pixel(map, at.image, at.y + i / taken - before, at.x + i % taken - before);
    for (int64_t c = 0; c < map.c; c += kLanes) {
      Vec d[taken * taken], found[points * points];
#pragma GCC unroll 16
      for (int i = 0; i < taken * taken; ++i) d[i] = at_address(from[i] + c);
      both_ways<transform, taken, points>(d, found);
      float* to = v + (c / kPanel * rows + t) * kPanel + c % kPanel;
#pragma GCC unroll 16
      for (int p = 0; p < points * points; ++p) at_address(to + p * point) = found[p];
    }
  }
}

struct Output {
  Map map;
  float* data;
  std::vector<float> bias;  // whole panels
  std::optional<Map> residual;
  bool relu;
};

// m (points, rows, 32): the channels from `c0` on of `count` tiles.
template <typename S>
GST_BODY void give_tiles(const Output& out, int64_t first, int64_t count, int64_t rows, int64_t c0, const float* m) {
  constexpr int points = S::points * S::points;
  for (int64_t t = 0; t < count; ++t) {
    const Place at(out.map, first + t);
    for (int64_t c = c0; c < std::min(c0 + kPanel, out.map.c); c += kLanes) {
      Vec x[points], y[4];
#pragma GCC unroll 16
      for (int p = 0; p < points; ++p) x[p] = at_address(m + (p * rows + t) * kPanel + c - c0);
      both_ways<S::result, S::points, 2>(x, y);
      for (int i = 0; i < 4; ++i) {
        const int64_t to = offset(out.map, at.image, at.y + i / 2, at.x + i % 2);
        if (to < 0) continue;
        Vec value = y[i] + at_address(out.bias.data() + c);
        if (out.residual) value += at_address(pixel(*out.residual, at.image, at.y + i / 2, at.x + i % 2) + c);
        if (out.relu) value = value < 0.0f ? Vec{} : value;
        if (out.map.c - c >= kLanes) at_address(out.data + to + c) = value;
        else std::memcpy(out.data + to + c, &value, (out.map.c - c) * sizeof(float));
      }
    }
  }
}

// +------------------------------------------------------------------------------------------------------------------+
// | Filters: to the points and back                                                                                  |
// +------------------------------------------------------------------------------------------------------------------+

struct Live {  // index (count,), all of them one after the other or not
  bool all;
  std::vector<int64_t> index;
  Live(const OptTensor& live, int64_t c) : all(!live), index(live ? live->numel() : c) {
    const Tensor given = live ? live->contiguous() : Tensor();
    for (size_t i = 0; i < index.size(); ++i) {
      index[i] = live ? given.const_data_ptr<int64_t>()[i] : static_cast<int64_t>(i);
      TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < c, "masked_conv2d: live channel ", index[i], " of ", c);
    }
  }
  int64_t count() const { return index.size(); }
};

struct Filters {  // w (all filters, 9, c_in), the live filters `out` and their live channels `in`
  float* w;
  int64_t c_in;
  Live out, in;
  Filters(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in)
      : w(weight.data_ptr<float>()), c_in(weight.size(1)), out(live_out, weight.size(0)), in(live_in, c_in) {}
  float* tap(int64_t o, int t) const { return w + (out.index[o] * 9 + t) * c_in; }
};

template <typename S>
GST_BODY void take_filter(const Filters& f, bool flipped, int64_t o, int64_t i, int64_t lanes, Vec* found) {
  Vec g[9] = {};
  for (int t = 0; t < 9; ++t) {
    const float* from = f.tap(o, flipped ? 8 - t : t);
    if (f.in.all && lanes == kLanes) g[t] = at_address(from + i);
    else
      for (int64_t j = 0; j < lanes; ++j) g[t][j] = from[f.in.index[i + j]];
  }
  both_ways<S::filter, 3, S::points>(g, found);
}

// The panel (points, depth, 32) of u: 32 filters from n on by channels from k0 to k1; flipped, channels by filters.
template <typename S>
GST_BODY void take_filters(const Filters& f, bool flipped, int64_t n, int64_t k0, int64_t k1, float* u) {
  constexpr int points = S::points * S::points;
  const int64_t depth = (flipped ? f.out : f.in).count();
  const int64_t n1 = std::min(n + kPanel, (flipped ? f.in : f.out).count());
  Vec found[points], rows[points][kPanel];
  for (int64_t i = n; flipped && i < n1; i += kLanes)
    for (int64_t o = k0; o < k1; ++o) {
      take_filter<S>(f, true, o, i, std::min(kLanes, n1 - i), found);
      for (int p = 0; p < points; ++p) at_address(u + (p * depth + o) * kPanel + i - n) = found[p];
    }
  for (int64_t i = k0; !flipped && i < k1; i += kLanes) {
    const int64_t lanes = std::min(kLanes, k1 - i);
    for (int64_t o = n; o < n1; ++o) {
      take_filter<S>(f, false, o, i, lanes, found);
      for (int p = 0; p < points; ++p) rows[p][o - n] = found[p];
    }
    for (int p = 0; p < points; ++p)
      for (int64_t j = 0; j < lanes; ++j)
        for (int64_t o = 0; o < kPanel; ++o) u[(p * depth + i + j) * kPanel + o] = rows[p][o][j];
  }
}

// The gradient of 32 channels of filters o0 to o1, from their du (points, panels, rows, 32).
template <typename S>
GST_BODY void give_filters(const Filters& f, int64_t i0, int64_t o0, int64_t o1, int64_t rows, const float* du) {
  constexpr int points = S::points * S::points;
  const int64_t end = std::min(i0 + kPanel, f.in.count()), point = round_up(f.in.count(), kPanel) * rows;
  for (int64_t o = o0; o < o1; ++o)
    for (int64_t i = i0; i < end; i += kLanes) {
      Vec u[points], g[9];
#pragma GCC unroll 16
      for (int p = 0; p < points; ++p) u[p] = at_address(du + p * point + (i0 / kPanel * rows + o) * kPanel + i - i0);
      both_ways<S::filter_transposed, S::points, 3>(u, g);
      for (int t = 0; t < 9; ++t)
        if (f.in.all && end - i >= kLanes) at_address(f.tap(o, t) + i) = g[t];
        else
          for (int64_t j = 0; j < std::min(kLanes, end - i); ++j) f.tap(o, t)[f.in.index[i + j]] = g[t][j];
    }
}

// +------------------------------------------------------------------------------------------------------------------+
// | The matrix products                                                                                              |
// +------------------------------------------------------------------------------------------------------------------+

// c (8, 32) = or += a (8, depth) by b (depth, 32). a's rows are `row` apart and its columns `column`, but every 32
// columns the next ones are at `jump`.
template <int vectors, int row, int column>
GST_BODY void block_product(const float* a, int64_t jump, const float* b, int64_t depth, float* c, bool add) {
  Vec sum[kRows][vectors] = {};
  for (; depth > 0; depth -= kPanel, a += jump) {
    const float* p = a;
    for (int64_t k = 0; k < std::min(depth, kPanel); ++k, p += column, b += kPanel)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[r][v] += p[r * row] * at_address(b + v * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vec& to = at_address(c + r * kPanel + v * kLanes);
      to = add ? to + sum[r][v] : sum[r][v];
    }
}

// A block of tiles from x to y, in v (points, panels, rows, 32) and m (points, rows, 32).
template <typename S>
GST_BODY void convolve(const Map& x, const float* u, const Output& y, int64_t first, int64_t rows, float* v, float* m) {
  constexpr int points = S::points * S::points;
  const int64_t count = std::min(rows, x.tiles - first), jump = rows * kPanel;
  take_tiles<S::data, S::taken, S::before, S::points>(x, first, count, rows, v);
  for (int64_t c = 0; c < y.map.c; c += kPanel) {
    for (int p = 0; p < points; ++p, u += x.c * kPanel)
      for (int64_t r = 0; r < count; r += kRows) {
        const float* a = v + p * round_up(x.c, kPanel) * rows + r * kPanel;
        float* to = m + (p * rows + r) * kPanel;
        if (y.map.c - c > kLanes) block_product<2, kPanel, 1>(a, jump, u, x.c, to, false);
        else block_product<1, kPanel, 1>(a, jump, u, x.c, to, false);
      }
    give_tiles<S>(y, first, count, rows, c, m);
  }
}

// du (c_out, 32) = or += the transposed d (panels, rows, 32) by v (rows, 32), `width` of 32 columns.
GST_CLONES void multiply_gradient(const float* d, const float* v, int64_t count, int64_t rows, int64_t c_out,
                                  int64_t width, float* du, bool add) {
  for (int64_t o = 0; o < c_out; o += kRows) {
    const float* a = d + o / kPanel * rows * kPanel + o % kPanel;
    if (width > kLanes) block_product<2, 1, kPanel>(a, kPanel * kPanel, v, count, du + o * kPanel, add);
    else block_product<1, 1, kPanel>(a, kPanel * kPanel, v, count, du + o * kPanel, add);
  }
}

template <typename S>
GST_BODY void take_pair(const Map& x, const Map& y, int64_t first, int64_t count, int64_t rows, float* v, float* d) {
  take_tiles<S::data, S::taken, S::before, S::points>(x, first, count, rows, v);
  take_tiles<S::result_transposed, 2, 0, S::points>(y, first, count, rows, d);
}

#define GST_EITHER(name, body, parameters, arguments)                  \
  GST_CLONES void name parameters {                                    \
    whole ? body<WholeMap> arguments : body<Tiles> arguments;          \
  }
GST_EITHER(convolve_block, convolve, (bool whole, const Map& x, const float* u, const Output& y, int64_t first,
                                      int64_t rows, float* v, float* m), (x, u, y, first, rows, v, m))
GST_EITHER(take_pairs, take_pair, (bool whole, const Map& x, const Map& y, int64_t first, int64_t count, int64_t rows,
                                   float* v, float* d), (x, y, first, count, rows, v, d))
GST_EITHER(take_panel, take_filters, (bool whole, const Filters& f, bool flipped, int64_t n, int64_t k0, int64_t k1,
                                      float* u), (f, flipped, n, k0, k1, u))
GST_EITHER(give_panel, give_filters, (bool whole, const Filters& f, int64_t i0, int64_t o0, int64_t o1, int64_t rows,
                                      const float* du), (f, i0, o0, o1, rows, du))
#undef GST_EITHER

void check_filters(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "winograd: filters must be 3x3, not ",
              weight.sizes());
}

template <typename F>
void for_each(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace

// +------------------------------------------------------------------------------------------------------------------+
// | The operators                                                                                                    |
// +------------------------------------------------------------------------------------------------------------------+

// Measured: with fewer channels the transforms cost what the products save, with fewer tiles those of the filters do,
// and without AVX-512 it has not been measured. Nothing but channels-last is read without a copy.
bool winograd_pays(const Tensor& x, const Tensor& weight, int64_t c_out, int64_t stride, int64_t padding) {
#if GST_HAS_CLONES
  static const bool wide_vectors = __builtin_cpu_supports("x86-64-v4");
#else
  constexpr bool wide_vectors = false;
#endif
  const int64_t tiles = x.size(0) * ((x.size(2) + 1) / 2) * ((x.size(3) + 1) / 2);
  return wide_vectors && x.is_cpu() && x.scalar_type() == at::kFloat && weight.size(2) == 3 && weight.size(3) == 3 &&
         (x.suggest_memory_format() == kLast || weight.suggest_memory_format() == kLast) && stride == 1 &&
         padding == 1 && x.size(1) >= kPanel && c_out >= kPanel && tiles >= 64;
}

Tensor winograd_filters(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in, int64_t h, int64_t w,
                        bool flipped) {
  constexpr int64_t kPiece = 64;
  check_filters(weight);
  const Tensor given = weight.contiguous(kLast);
  const Filters f(given, live_out, live_in);
  const bool whole = whole_map(h, w);
  const int64_t depth = (flipped ? f.out : f.in).count(), n = (flipped ? f.in : f.out).count();
  const int64_t points = points_of(whole), pieces = (depth + kPiece - 1) / kPiece;
  const Tensor u = at::empty({round_up(n, kPanel) / kPanel, points, depth, kPanel}, at::TensorOptions(at::kFloat));
  float* to = u.data_ptr<float>();
  for_each(u.size(0) * pieces, [&](int64_t i) {
    const int64_t panel = i / pieces, k = i % pieces * kPiece;
    take_panel(whole, f, flipped, panel * kPanel, k, std::min(k + kPiece, depth),
                      to + panel * points * depth * kPanel);
  });
  return u;
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& filters, int64_t c, const OptTensor& bias,
                       const OptTensor& residual, bool relu) {
  const Tensor given = x.contiguous(kLast), added = residual ? residual->contiguous(kLast) : Tensor();
  const Tensor y = at::empty({x.size(0), c, x.size(2), x.size(3)}, x.options(), kLast);
  const bool whole = whole_map(x.size(2), x.size(3));
  TORCH_CHECK(filters.sizes() == at::IntArrayRef({round_up(c, kPanel) / kPanel, points_of(whole), x.size(1), kPanel}) &&
              (!bias || bias->numel() == c) && (!residual || residual->sizes() == y.sizes()),
              "winograd_conv2d: filters, bias or residual do not fit x ", x.sizes());
  const Map map(given);
  Output out{Map(y), y.data_ptr<float>(), std::vector<float>(round_up(c, kPanel)), std::nullopt, relu};
  if (bias) std::copy_n(bias->contiguous().const_data_ptr<float>(), c, out.bias.begin());
  if (residual) out.residual.emplace(added);

  const int64_t points = points_of(whole), threads = at::get_num_threads(), wide = points * round_up(map.c, kPanel);
  const int64_t fair = round_up((map.tiles + threads - 1) / threads, kRows);
  const int64_t rows = std::clamp(kForwardBytes / 4 / wide / kRows * kRows, kRows, fair);
  const int64_t v = wide * rows, m = points * kPanel * rows;
  const Tensor scratch = at::empty({threads, v + m}, at::TensorOptions(at::kFloat));
  for_each((map.tiles + rows - 1) / rows, [&](int64_t block) {
    float* mine = scratch.data_ptr<float>() + at::get_thread_num() * (v + m);
    convolve_block(whole, map, filters.const_data_ptr<float>(), out, block * rows, rows, mine, mine + v);
  });
  return y;
}

Tensor winograd_weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight, const OptTensor& live_out,
                                const OptTensor& live_in) {
  constexpr int64_t kPiece = 8;  // tiles that a thread transforms at a time, or filters
  check_filters(weight);
  const Tensor given = x.contiguous(kLast), above = grad.contiguous(kLast);
  const Tensor dw = live_out || live_in ? at::zeros_like(weight, {}, kLast) : at::empty_like(weight, {}, kLast);
  const Filters f(dw, live_out, live_in);
  TORCH_CHECK(x.size(1) == f.in.count() &&
              grad.sizes() == at::IntArrayRef({x.size(0), f.out.count(), x.size(2), x.size(3)}),
              "winograd_weight_gradient: grad ", grad.sizes(), " does not fit x ", x.sizes());
  const Map from(given), to(above);
  const bool whole = whole_map(from.h, from.w);
  const int64_t points = points_of(whole), c_in = round_up(from.c, kPanel), c_out = round_up(to.c, kPanel);
  const int64_t rows = std::clamp<int64_t>(kGradientBytes / 4 / points / (c_in + c_out), 64, from.tiles);
  const Tensor scratch = at::empty({points * (rows * (c_in + c_out) + c_in * c_out)}, at::TensorOptions(at::kFloat));
  float *v = scratch.data_ptr<float>(), *d = v + points * rows * c_in, *du = d + points * rows * c_out;
  for (int64_t first = 0; first < from.tiles; first += rows) {
    const int64_t count = std::min(rows, from.tiles - first);
    for_each((count + kPiece - 1) / kPiece, [&](int64_t i) {
      const int64_t t = i * kPiece;
      take_pairs(whole, from, to, first + t, std::min(kPiece, count - t), rows, v + t * kPanel, d + t * kPanel);
    });
    for_each(points * c_in / kPanel, [&](int64_t i) {  // v's and du's panels, one after the other in both
      const int64_t point = i / (c_in / kPanel), left = from.c - i % (c_in / kPanel) * kPanel;
      multiply_gradient(d + point * c_out * rows, v + i * kPanel * rows, count, rows, to.c, left,
                        du + i * kPanel * c_out, first > 0);
    });
  }
  const int64_t pieces = (to.c + kPiece - 1) / kPiece;
  for_each(c_in / kPanel * pieces, [&](int64_t i) {
    const int64_t o = i % pieces * kPiece;
    give_panel(whole, f, i / pieces * kPanel, o, std::min(o + kPiece, to.c), c_out, du);
  });
  return dw.contiguous(weight.suggest_memory_format());
}

}  // namespace gst
