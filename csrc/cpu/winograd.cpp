// 3x3 convolutions of stride 1 and padding 1 in float32 by Winograd's minimal filtering (Lavin and
// Gray 2015): a tile of 2x2 results takes 16 products per input channel and filter instead of 36;
// one that is the whole map takes 9.
//     Y = A'[(G w G') . (B' x B)]A,    dx: the same with filters flipped and transposed,
//     dw = G'[(A dY A') . (B' x B)]G,
// the dot summed over channels, or for dw over tiles: one matrix product for each of the points of
// a tile. Blocks of tiles are so small that their transforms stay in a core's cache until they are
// multiplied. F(2x2,3x3) multiplies by 0, 1 and 1/2 only, so it is as accurate as the direct sum;
// larger tiles are not.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../operators.h"
#include "clones.h"

namespace gst {
namespace {

// Channels of a vector and of a panel of a matrix (..., rows, 32); rows of the kPanel wide part of
// a product that the registers hold.
constexpr int64_t kLanes = 16, kPanel = 32, kRows = 8;
// Of a block's transformed data, and its least tiles: filters, or gradients of transformed filters,
// of many channels fill the L2 cache alone and are read again for every block.
constexpr int64_t kForwardBytes = 512 << 10, kForwardTiles = 32;
constexpr int64_t kGradientBytes = 2 << 20, kGradientTiles = 128;
// Floats between the data of two points: at a distance of whole 4 KiB, the 16 values of a tile
// would all fall on the same lines of the L1 cache.
constexpr int64_t kGap = 64;
constexpr int64_t kFilterChannels = 64, kGradientPiece = 8;  // a thread's share at a time

// Several registers on smaller CPUs.
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

GST_BODY Vec& vec_at(const float* p) { return *reinterpret_cast<Vec*>(const_cast<float*>(p)); }

// The transforms of one dimension, and the transposes of two of them.

struct Tiles {  // F(2,3): two results of a longer row from four values
  static constexpr int points = 4, inputs = 4, before = 1;
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

// A row of two, zeros around it: y0 = s + (g2 - g1) d1, y1 = s + (g0 - g1) d0, s = g1 (d0 + d1).
struct WholeMap {
  static constexpr int points = 3, inputs = 2, before = 0;
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
GST_BODY void transform_2d(const Vec* x, Vec* y) {  // x (in, in), y (out, out)
  Vec half[in * out];
#pragma GCC unroll 4
  for (int i = 0; i < in; ++i) transform(x + i * in, half + i * out);
#pragma GCC unroll 4
  for (int j = 0; j < out; ++j) {
    Vec column[in], transformed[out];
#pragma GCC unroll 4
    for (int i = 0; i < in; ++i) column[i] = half[i * out + j];
    transform(column, transformed);
#pragma GCC unroll 4
    for (int i = 0; i < out; ++i) y[i * out + j] = transformed[i];
  }
}

GST_BODY int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool is_whole_map(const Tensor& x) { return x.size(2) <= 2 && x.size(3) <= 2; }

int64_t count_points(bool whole) { return whole ? 9 : 16; }

struct Tile {
  int64_t image, y, x;
};

struct Map {  // channels-last
  const float* data;
  int64_t c, h, w, tile_rows, tile_columns, tiles;
  int64_t last;  // the offset of the last pixel
  // Zeros, for what is outside, and the last pixel, of which whole vectors may be read here.
  std::vector<float> edge;
  explicit Map(const Tensor& x)
      : data(x.const_data_ptr<float>()), c(x.size(1)), h(x.size(2)), w(x.size(3)),
        tile_rows((h + 1) / 2), tile_columns((w + 1) / 2),
        tiles(x.size(0) * tile_rows * tile_columns), last(x.numel() - c),
        edge(2 * round_up(c, kLanes)) {
    std::copy_n(data + last, c, edge.end() - round_up(c, kLanes));
  }
  GST_INLINE Tile tile(int64_t i) const {
    return {i / (tile_rows * tile_columns), i / tile_columns % tile_rows * 2, i % tile_columns * 2};
  }
  // The offset of a tile's pixel (dy, dx) in the data; -1: outside.
  GST_INLINE int64_t offset(const Tile& tile, int dy, int dx) const {
    const int64_t y = tile.y + dy, x = tile.x + dx;
    return y < 0 || x < 0 || y >= h || x >= w ? -1 : ((tile.image * h + y) * w + x) * c;
  }
  GST_INLINE const float* pixel(const Tile& tile, int dy, int dx) const {
    const int64_t at = offset(tile, dy, dx);
    return at < 0 ? edge.data() : at == last ? edge.data() + round_up(c, kLanes) : data + at;
  }
};

// v (points, panels, rows, 32), its points `point` apart, its first `count` rows, from the tiles of
// `first` on. Channels that fill up a vector hold whatever is next in memory: no product lets them
// into a result that is kept.
template <auto transform, int inputs, int before, int points>
GST_BODY void transform_tiles(
    const Map& map, int64_t first, int64_t count, int64_t rows, int64_t point, float* v) {
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = map.tile(first + t);
    const float* from[inputs * inputs];
    for (int i = 0; i < inputs * inputs; ++i)
      from[i] = map.pixel(tile, i / inputs - before, i % inputs - before);
    for (int64_t c = 0; c < map.c; c += kLanes) {
      Vec d[inputs * inputs], transformed[points * points];
#pragma GCC unroll 16
      for (int i = 0; i < inputs * inputs; ++i) {
        d[i] = vec_at(from[i] + c);
        // The pixels of two tiles ahead: the processor's own prefetching comes late.
        if (i % inputs >= inputs - 2) __builtin_prefetch(from[i] + c + 4 * map.c);
      }
      transform_2d<transform, inputs, points>(d, transformed);
      float* to = v + (c / kPanel * rows + t) * kPanel + c % kPanel;
#pragma GCC unroll 16
      for (int p = 0; p < points * points; ++p) vec_at(to + p * point) = transformed[p];
    }
  }
}

// c (8, 32) = or += a (8, depth) by b (depth, 32). a's rows are `row` apart and its columns
// `column`, but every 32 columns the next ones are at `jump`.
template <int vectors, int row, int column>
GST_BODY void multiply_panels(
    const float* a, int64_t jump, const float* b, int64_t depth, float* c, bool add) {
  Vec sum[kRows][vectors] = {};
  for (; depth > 0; depth -= kPanel, a += jump) {
    const float* p = a;
    for (int64_t k = 0; k < std::min(depth, kPanel); ++k, p += column, b += kPanel)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[r][v] += p[r * row] * vec_at(b + v * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vec& to = vec_at(c + r * kPanel + v * kLanes);
      to = add ? to + sum[r][v] : sum[r][v];
    }
}

// The jobs that threads share, one step each for an i, and their steps for tiles of the kind S.

struct Convolution {
  bool whole;
  Map x, y;
  const float* filters;
  float* out;
  std::vector<float> bias;  // whole panels
  std::optional<Map> residual;
  bool relu;
  int64_t rows;              // tiles of a block
  int64_t v_point, m_point;  // from one point's data to the next's
  float* scratch;
};

// From m (points, rows, 32): the channels from `c0` on of `count` tiles.
template <typename S>
GST_BODY void write_tiles(
    const Convolution& job, int64_t first, int64_t count, int64_t c0, const float* m) {
  constexpr int points = S::points * S::points;
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = job.y.tile(first + t);
    for (int64_t c = c0; c < std::min(c0 + kPanel, job.y.c); c += kLanes) {
      Vec x[points], y[4];
#pragma GCC unroll 16
      for (int p = 0; p < points; ++p) x[p] = vec_at(m + p * job.m_point + t * kPanel + c - c0);
      transform_2d<S::result, S::points, 2>(x, y);
      for (int i = 0; i < 4; ++i) {
        const int64_t to = job.y.offset(tile, i / 2, i % 2);
        if (to < 0) continue;
        Vec value = y[i] + vec_at(job.bias.data() + c);
        if (job.residual) value += vec_at(job.residual->pixel(tile, i / 2, i % 2) + c);
        if (job.relu) value = value < 0.0f ? Vec{} : value;
        if (job.y.c - c >= kLanes) vec_at(job.out + to + c) = value;
        else std::memcpy(job.out + to + c, &value, (job.y.c - c) * sizeof(float));
      }
    }
  }
}

// The i-th block of tiles, in v (points, panels, rows, 32) and m (points, rows, 32).
template <typename S>
GST_BODY void convolve_body(const Convolution& job, int64_t i) {
  constexpr int points = S::points * S::points;
  const int64_t rows = job.rows, first = i * rows, count = std::min(rows, job.x.tiles - first);
  const int64_t depth = job.x.c;
  float* v = job.scratch + at::get_thread_num() * points * (job.v_point + job.m_point);
  float* m = v + points * job.v_point;
  const float* u = job.filters;
  transform_tiles<S::data, S::inputs, S::before, S::points>(
      job.x, first, count, rows, job.v_point, v);
  for (int64_t c = 0; c < job.y.c; c += kPanel) {
    for (int p = 0; p < points; ++p, u += depth * kPanel)
      for (int64_t r = 0; r < count; r += kRows) {
        const float* a = v + p * job.v_point + r * kPanel;
        float* to = m + p * job.m_point + r * kPanel;
        if (job.y.c - c > kLanes)
          multiply_panels<2, kPanel, 1>(a, rows * kPanel, u, depth, to, false);
        else multiply_panels<1, kPanel, 1>(a, rows * kPanel, u, depth, to, false);
      }
    write_tiles<S>(job, first, count, c, m);
  }
}

std::vector<int64_t> live_channels(const OptTensor& live, int64_t all) {
  const OptTensor index = contiguous(live);
  return gst::live_channels(
      index ? index->const_data_ptr<int64_t>() : nullptr, live ? live->numel() : all, all);
}

struct Filters {  // w (all filters, 9, c_in), the live filters `out` and their live channels `in`
  float* w;
  int64_t c_in;
  bool all_in;  // whether all channels are live
  std::vector<int64_t> out, in;
  Filters(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in)
      : w(weight.data_ptr<float>()), c_in(weight.size(1)), all_in(!live_in),
        out(live_channels(live_out, weight.size(0))), in(live_channels(live_in, c_in)) {
    TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3, "winograd: filters must be 3x3, not ",
        weight.sizes());
  }
  GST_INLINE float* tap(int64_t o, int t) const { return w + (out[o] * 9 + t) * c_in; }
};

struct FilterTransform {
  bool whole, flipped;
  Filters filters;
  int64_t depth, n, pieces;  // channels and filters of the product; kFilterChannels of depth each
  float* u;
};

// A piece of a panel (points, depth, 32): 32 filters by some channels or, flipped, 32 channels by
// some filters.
template <typename S>
GST_BODY void transform_filters_body(const FilterTransform& job, int64_t piece) {
  constexpr int points = S::points * S::points;
  const Filters& f = job.filters;
  const int64_t panel = piece / job.pieces, n0 = panel * kPanel, n1 = std::min(n0 + kPanel, job.n);
  const int64_t k0 = piece % job.pieces * kFilterChannels,
                k1 = std::min(k0 + kFilterChannels, job.depth);
  float* u = job.u + panel * points * job.depth * kPanel;
  for (int64_t k = k0; k < k1; ++k)
    for (int64_t n = n0; n < n1; n += kLanes) {
      const int64_t lanes = std::min(kLanes, n1 - n);
      Vec g[9] = {}, transformed[points];
      for (int t = 0; t < 9; ++t)
        if (job.flipped && f.all_in && lanes == kLanes) g[t] = vec_at(f.tap(k, 8 - t) + n);
        else
          for (int64_t j = 0; j < lanes; ++j)
            g[t][j] = job.flipped ? f.tap(k, 8 - t)[f.in[n + j]] : f.tap(n + j, t)[f.in[k]];
      transform_2d<S::filter, 3, S::points>(g, transformed);
      for (int p = 0; p < points; ++p)
        vec_at(u + (p * job.depth + k) * kPanel + n - n0) = transformed[p];
    }
}

struct WeightGradient {
  bool whole;
  Map x, y;
  Filters dw;
  int64_t c_in, c_out, rows;  // in whole panels; tiles of a block
  int64_t v_point, d_point, u_point;  // from one point's data to the next's
  int64_t first, count;       // of the block that is being added
  float *v, *d;               // x and y transformed, (points, panels, rows, 32)
  float* du;                  // dw transformed, (points, panels, c_out, 32)
};

// A piece of the block's tiles.
template <typename S>
GST_BODY void transform_maps_body(const WeightGradient& job, int64_t piece) {
  const int64_t t = piece * kGradientPiece, first = job.first + t,
                count = std::min(kGradientPiece, job.count - t);
  transform_tiles<S::data, S::inputs, S::before, S::points>(
      job.x, first, count, job.rows, job.v_point, job.v + t * kPanel);
  transform_tiles<S::result_transposed, 2, 0, S::points>(
      job.y, first, count, job.rows, job.d_point, job.d + t * kPanel);
}

// du's i-th panel (c_out, 32) = or += d transposed by v's i-th panel (rows, 32).
GST_CLONES void multiply_maps(const WeightGradient& job, int64_t i) {
  const int64_t panels = job.c_in / kPanel, point = i / panels, panel = i % panels,
                width = job.x.c - panel * kPanel;
  const float *d = job.d + point * job.d_point,
              *v = job.v + point * job.v_point + panel * kPanel * job.rows;
  for (int64_t o = 0; o < job.y.c; o += kRows) {
    const float* a = d + o / kPanel * job.rows * kPanel + o % kPanel;
    float* to = job.du + point * job.u_point + (panel * job.c_out + o) * kPanel;
    if (width > kLanes)
      multiply_panels<2, 1, kPanel>(a, kPanel * kPanel, v, job.count, to, job.first > 0);
    else multiply_panels<1, 1, kPanel>(a, kPanel * kPanel, v, job.count, to, job.first > 0);
  }
}

// The gradient of 32 channels of some filters.
template <typename S>
GST_BODY void write_gradient_body(const WeightGradient& job, int64_t piece) {
  constexpr int points = S::points * S::points;
  const int64_t pieces = (job.y.c + kGradientPiece - 1) / kGradientPiece,
                i0 = piece / pieces * kPanel;
  const int64_t o0 = piece % pieces * kGradientPiece, o1 = std::min(o0 + kGradientPiece, job.y.c);
  const int64_t i1 = std::min(i0 + kPanel, job.x.c);
  for (int64_t o = o0; o < o1; ++o)
    for (int64_t i = i0; i < i1; i += kLanes) {
      const float* from = job.du + (i0 * job.c_out + o * kPanel) + i - i0;
      Vec u[points], g[9];
#pragma GCC unroll 16
      for (int p = 0; p < points; ++p) u[p] = vec_at(from + p * job.u_point);
      transform_2d<S::filter_transposed, S::points, 3>(u, g);
      for (int t = 0; t < 9; ++t)
        if (job.dw.all_in && i1 - i >= kLanes) vec_at(job.dw.tap(o, t) + i) = g[t];
        else
          for (int64_t j = 0; j < std::min(kLanes, i1 - i); ++j)
            job.dw.tap(o, t)[job.dw.in[i + j]] = g[t][j];
    }
}

// A function with GST_CLONES cannot be a template.
#define GST_STEP(name, Job)                                                 \
  GST_CLONES void name(const Job& job, int64_t i) {                         \
    job.whole ? name##_body<WholeMap>(job, i) : name##_body<Tiles>(job, i); \
  }
GST_STEP(convolve, Convolution)
GST_STEP(transform_filters, FilterTransform)
GST_STEP(transform_maps, WeightGradient)
GST_STEP(write_gradient, WeightGradient)
#undef GST_STEP

template <typename Job>
void for_each(int64_t n, void (*step)(const Job&, int64_t), const Job& job) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step(job, i);
  });
}

Tensor scratch(int64_t floats) { return at::empty({floats}, at::TensorOptions(at::kFloat)); }

}  // namespace

// Measured: with fewer channels the transforms cost what the products save, with fewer tiles those
// of the filters do, and without AVX-512 it has not been measured. Only channels-last maps are read
// without a copy.
bool winograd_pays(
    const Tensor& x, const Tensor& weight, int64_t c_out, int64_t stride, int64_t padding) {
  const int64_t tiles = x.size(0) * ((x.size(2) + 1) / 2) * ((x.size(3) + 1) / 2);
  return has_wide_vectors() && x.is_cpu() && x.scalar_type() == at::kFloat && weight.size(2) == 3 &&
      weight.size(3) == 3 &&
      (x.suggest_memory_format() == kChannelsLast ||
          weight.suggest_memory_format() == kChannelsLast) &&
      stride == 1 && padding == 1 && x.size(1) >= kPanel && c_out >= kPanel && tiles >= 64;
}

Tensor winograd_filters(const Tensor& weight, const OptTensor& live_out, const OptTensor& live_in,
    int64_t h, int64_t w, bool flipped) {
  const Tensor given = weight.contiguous(kChannelsLast);
  const bool whole = h <= 2 && w <= 2;
  FilterTransform job{whole, flipped, Filters(given, live_out, live_in)};
  job.depth = (flipped ? job.filters.out : job.filters.in).size();
  job.n = (flipped ? job.filters.in : job.filters.out).size();
  job.pieces = divide_up(job.depth, kFilterChannels);
  const int64_t panels = divide_up(job.n, kPanel);
  const Tensor u = scratch(panels * count_points(whole) * job.depth * kPanel);
  job.u = u.data_ptr<float>();
  for_each(panels * job.pieces, transform_filters, job);
  return u.view({panels, count_points(whole), job.depth, kPanel});
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& filters, int64_t c, const OptTensor& bias,
    const OptTensor& residual, bool relu) {
  const Tensor given = x.contiguous(kChannelsLast),
               added = residual ? residual->contiguous(kChannelsLast) : Tensor();
  const Tensor y = at::empty({x.size(0), c, x.size(2), x.size(3)}, x.options(), kChannelsLast);
  const bool whole = is_whole_map(x);
  const int64_t points = count_points(whole);
  TORCH_CHECK(
      filters.sizes() == at::IntArrayRef({divide_up(c, kPanel), points, x.size(1), kPanel}) &&
          (!bias || bias->numel() == c) && (!residual || residual->sizes() == y.sizes()),
      "winograd_conv2d: filters, bias or residual do not fit x ", x.sizes());
  Convolution job{whole, Map(given), Map(y), filters.const_data_ptr<float>(), y.data_ptr<float>()};
  job.bias.resize(round_up(c, kPanel));
  if (bias) std::copy_n(bias->contiguous().const_data_ptr<float>(), c, job.bias.begin());
  if (residual) job.residual.emplace(added);
  job.relu = relu;
  const int64_t threads = at::get_num_threads(), panels = round_up(job.x.c, kPanel);
  const int64_t fair = round_up(divide_up(job.x.tiles, threads), kRows);
  job.rows = std::clamp(
      kForwardBytes / 4 / points / panels / kRows * kRows, std::min(kForwardTiles, fair), fair);
  job.v_point = panels * job.rows + kGap;
  job.m_point = kPanel * job.rows + kGap;
  const Tensor memory = scratch(threads * points * (job.v_point + job.m_point));
  job.scratch = memory.data_ptr<float>();
  for_each(divide_up(job.x.tiles, job.rows), convolve, job);
  return y;
}

Tensor winograd_weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight,
    const OptTensor& live_out, const OptTensor& live_in) {
  const Tensor given = x.contiguous(kChannelsLast), above = grad.contiguous(kChannelsLast);
  const Tensor dw = live_out || live_in ? at::zeros_like(weight, {}, kChannelsLast)
                                        : at::empty_like(weight, {}, kChannelsLast);
  const bool whole = is_whole_map(x);
  WeightGradient job{whole, Map(given), Map(above), Filters(dw, live_out, live_in)};
  const int64_t c_in = job.dw.in.size(), c_out = job.dw.out.size();
  TORCH_CHECK(x.size(1) == c_in &&
          grad.sizes() == at::IntArrayRef({x.size(0), c_out, x.size(2), x.size(3)}),
      "winograd_weight_gradient: grad ", grad.sizes(), " does not fit x ", x.sizes());
  const int64_t points = count_points(whole);
  job.c_in = round_up(c_in, kPanel);
  job.c_out = round_up(c_out, kPanel);
  job.rows = std::clamp(kGradientBytes / 4 / points / (job.c_in + job.c_out),
      std::min(kGradientTiles, job.x.tiles), job.x.tiles);
  job.v_point = job.rows * job.c_in + kGap;
  job.d_point = job.rows * job.c_out + kGap;
  job.u_point = job.c_in * job.c_out + kGap;
  const Tensor memory = scratch(points * (job.v_point + job.d_point + job.u_point));
  job.v = memory.data_ptr<float>();
  job.d = job.v + points * job.v_point;
  job.du = job.d + points * job.d_point;
  for (job.first = 0; job.first < job.x.tiles; job.first += job.rows) {
    job.count = std::min(job.rows, job.x.tiles - job.first);
    for_each(divide_up(job.count, kGradientPiece), transform_maps, job);
    for_each(points * job.c_in / kPanel, multiply_maps, job);
  }
  for_each(job.c_in / kPanel * divide_up(job.y.c, kGradientPiece), write_gradient, job);
  return dw.contiguous(weight.suggest_memory_format());
}

}  // namespace gst
