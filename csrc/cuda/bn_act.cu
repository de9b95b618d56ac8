// Batch norm + shortcut + mean |a| + ReLU (+ a 2x2 max-pool) on the GPU. Sums are taken in two stages, chunks of rows
// and then the chunks in order, without atomics, so they repeat exactly. No torch headers here: they would take nvcc a
// minute.
#include "bn_act.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../gst_math.h"

namespace gst {
namespace {

constexpr int kThreads = 256, kBlocks = 2;  // of a block that goes over a map; such blocks at a time, at least
constexpr int kColumns = 16;                // at most, of those: 16 of them read 256 bytes of a row
constexpr int kGroup = 4;                   // rows that a thread reads at a time: enough bytes in flight, or a window
constexpr int64_t kSums = 256;              // chunks at most where each is to be added up
constexpr int64_t kMostChunks = 65535;      // blocks that a grid may have in y
constexpr int kLanes = 32, kSlices = 16;    // of a block that adds up chunks: a lane a filter, in slices of its chunks

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// A pack as it is read and written, 16 bytes at once: the compiler would take one of values apart.
template <typename T, int V>
using Raw = std::conditional_t<V == 1, T, uint4>;

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> unpacked(const Raw<T, V>& raw) {
  Pack<T, V> pack;
  static_assert(sizeof(pack) == sizeof(raw));
  memcpy(&pack, &raw, sizeof(raw));
  return pack;
}

// What ReLU let through of a group: bit j * V + k for channel k of row j.
template <int V>
using Gate = std::conditional_t<(V > 4), uint32_t, std::conditional_t<(V > 2), uint16_t, uint8_t>>;

template <typename A, typename T>
__device__ __forceinline__ A wide(T x) {
  return static_cast<A>(x);
}
template <>
__device__ __forceinline__ float wide<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float wide<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T, typename A>
__device__ __forceinline__ T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// Row j of group g: kGroup rows that follow one another or, where a pool is to follow, a 2x2 window of a map this wide.
template <bool pool>
__device__ __forceinline__ int64_t row_of(int64_t g, int j, int64_t width) {
  if constexpr (!pool) return g * kGroup + j;
  const uint32_t windows = static_cast<uint32_t>(width / 2), line = static_cast<uint32_t>(g) / windows;
  return (line * int64_t{2} + (j >> 1)) * width + (static_cast<uint32_t>(g) - line * windows) * int64_t{2} + (j & 1);
}

// What of a map is this thread's: V channels from `first`, and groups begin, begin + blockDim.y, … below end.
template <int V>
struct Part {
  int64_t first, begin, end;
  bool any;
  __device__ Part(int64_t rows, int64_t c) {
    const int64_t groups = (rows + kGroup - 1) / kGroup, chunk = (groups + gridDim.y - 1) / gridDim.y;
    first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    begin = blockIdx.y * chunk + threadIdx.y;
    end = (blockIdx.y + 1) * chunk < groups ? (blockIdx.y + 1) * chunk : groups;
    any = first < c;
  }
};

template <typename A, int V>
__device__ __forceinline__ void read(A (&values)[V], const A* from) {
  const auto pack = *reinterpret_cast<const Pack<A, V>*>(from);
  for (int k = 0; k < V; ++k) values[k] = pack.v[k];
}

// A group's rows; zeros past the last.
template <typename T, int V, bool pool>
__device__ __forceinline__ void read_group(Raw<T, V> (&raw)[kGroup], const T* map, int64_t g, int64_t width,
                                           int64_t rows, int64_t c, int64_t first) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int64_t row = row_of<pool>(g, j, width);
    if (row < rows) raw[j] = *reinterpret_cast<const Raw<T, V>*>(map + row * c + first);
    else raw[j] = Raw<T, V>{};
  }
}

// A group's gradient: of its rows or, where they were pooled, their one.
template <typename T, int V, bool pool>
__device__ __forceinline__ void read_gradient(Raw<T, V> (&raw)[kGroup], const T* grad, int64_t g, int64_t rows,
                                              int64_t c, int64_t first) {
  if constexpr (pool) raw[0] = *reinterpret_cast<const Raw<T, V>*>(grad + g * c + first);
  else read_group<T, V, false>(raw, grad, g, 0, rows, c, first);
}

template <typename T, int V>
__device__ __forceinline__ void write(T* to, const Pack<T, V>& pack) {
  Raw<T, V> raw;
  memcpy(&raw, &pack, sizeof(raw));
  if constexpr (V == 1) *to = raw;
  else __stwb(reinterpret_cast<uint4*>(to), raw);  // a plain store would be taken apart
}

// Adds up one value per channel over the block's rows of threads, in order, and leaves it in partial[slot].
template <typename A, int V>
__device__ void reduce(const A (&sum)[V], A* partial, int64_t c, int slot) {
  __shared__ A shared[V][kThreads];
  const int high = blockDim.y, wide = blockDim.x, thread = threadIdx.y * wide + threadIdx.x;
  __syncthreads();  // an earlier reduction may still be read
  for (int k = 0; k < V; ++k) shared[k][thread] = sum[k];
  __syncthreads();
  const int column = thread % wide, k = thread / wide;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * wide + column) * V + k;
  if (k >= V || channel >= c) return;
  A total = 0;
  for (int y = 0; y < high; ++y) total += shared[k][y * wide + column];
  partial[(static_cast<int64_t>(blockIdx.y) * 2 + slot) * c + channel] = total;
}

// The sum of a channel's chunks (0 for channel -1): each slice in order, then the slices in order. One thread alone
// would wait for 256 reads, one after the other. All threads of the block must call it.
template <typename A>
__device__ double total(const A* partial, int64_t chunks, int64_t c, int64_t channel, int slot) {
  __shared__ double shared[kSlices][kLanes];
  const int64_t each = (chunks + kSlices - 1) / kSlices, begin = threadIdx.y * each;
  const int64_t end = begin + each < chunks ? begin + each : chunks;
  double sum = 0;
  if (channel >= 0)
    for (int64_t k = begin; k < end; ++k) sum += partial[(k * 2 + slot) * c + channel];
  __syncthreads();  // an earlier total may still be read
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int y = 0; y < kSlices; ++y) sum += shared[y][threadIdx.x];
  return sum;
}

// Which of the c live filters filter f is; -1 if it is pruned. Of no filter at all, the address is null too.
__device__ int64_t position(const int64_t* live, int64_t c, int64_t f) {
  if (!live) return f < c ? f : -1;
  int64_t low = 0, high = c;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (live[middle] < f) low = middle + 1;
    else high = middle;
  }
  return low < c && live[low] == f ? low : -1;
}

template <typename T, typename A, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) moments_kernel(BnAct p, const T* __restrict__ x) {
  const Part<V> part(p.rows, p.c);
  A sum[V] = {}, sum2[V] = {}, pilot[V] = {};
  if (part.any) {
    for (int k = 0; k < V; ++k) pilot[k] = bn_pilot(wide<A>(x[part.first + k]));
    for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
      Raw<T, V> in[kGroup];
      read_group<T, V, false>(in, x, g, 0, p.rows, p.c, part.first);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (g * kGroup + j < p.rows) {
          const Pack<T, V> value = unpacked<T, V>(in[j]);
          for (int k = 0; k < V; ++k) {
            const A d = wide<A>(value.v[k]) - pilot[k];
            sum[k] += d;
            sum2[k] += d * d;
          }
        }
    }
  }
  reduce<A, V>(sum, static_cast<A*>(p.partial), p.c, 0);
  reduce<A, V>(sum2, static_cast<A*>(p.partial), p.c, 1);
}

// The filter of this thread's lane.
__device__ int64_t lane_filter() { return static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x; }

// One lane for each filter: the statistics of the live ones, what apply_kernel multiplies by and adds, and what all
// running statistics become. The bias that the map does without shifts its mean; where it is no number, nor is the map.
template <typename T, typename A>
__global__ void statistics_kernel(BnAct p, int64_t chunks) {
  const int64_t f = lane_filter(), i = f < p.c_out ? position(p.live, p.c, f) : -1;
  A *running_mean = static_cast<A*>(p.running_mean), *running_var = static_cast<A*>(p.running_var);
  const A* partial = static_cast<const A*>(p.partial);
  double sum = 0, sum2 = 0;
  if (p.training) {
    sum = total(partial, chunks, p.c, i, 0);
    sum2 = total(partial, chunks, p.c, i, 1);
  }
  if (f >= p.c_out || threadIdx.y != 0) return;
  const A bias = p.bias ? static_cast<const A*>(p.bias)[f] : A(0);
  A mean = running_mean[f], invstd = static_cast<A>(1 / sqrt(running_var[f] + p.eps));
  if (p.training) {
    double seen_mean = 0, seen_var = 0;
    if (i >= 0) {
      const double count = static_cast<double>(p.rows);
      const A pilot = bn_pilot(wide<A>(static_cast<const T*>(p.x)[i]));
      const BnMoments b = bn_moments(sum, sum2, pilot, count, p.eps);
      mean = static_cast<A>(b.mean);
      invstd = static_cast<A>(b.invstd);
      seen_mean = b.mean + bias, seen_var = unbiased(b.var, count);
    }
    running_mean[f] = static_cast<A>(running(running_mean[f], seen_mean, p.momentum));
    running_var[f] = static_cast<A>(running(running_var[f], seen_var, p.momentum));
  }
  if (i < 0) return;
  A* coefficients = static_cast<A*>(p.coefficients);
  static_cast<A*>(p.mean)[i] = mean;
  static_cast<A*>(p.invstd)[i] = invstd;
  coefficients[i] = static_cast<const A*>(p.gamma)[f] * invstd;
  coefficients[p.c + i] = static_cast<const A*>(p.beta)[f] + 0 * bias;
}

// The residual's channel for each of a thread's, -1 for none.
template <int V>
__device__ __forceinline__ void sources(int (&source)[V], const int64_t* residual_map, int64_t first) {
  for (int k = 0; k < V; ++k) source[k] = static_cast<int>(residual_map ? residual_map[first + k] : first + k);
}

template <typename T, typename A, int V, bool mapped, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks)
apply_kernel(BnAct p, const T* __restrict__ x, const T* __restrict__ residual, const A* __restrict__ means,
             const A* __restrict__ coefficients, T* __restrict__ out, Gate<V>* __restrict__ gate) {
  const Part<V> part(p.rows, p.c);
  const bool measure = p.act && (!p.measure || *p.measure);
  const A lowest = lowest_value<A>(p.relu);
  A sum[V] = {};
  if (part.any) {
    A mean[V], scale[V], shift[V];
    int source[V];
    read(mean, means + part.first);
    read(scale, coefficients + part.first);
    read(shift, coefficients + p.c + part.first);
    if constexpr (mapped) sources(source, p.residual_map, part.first);
    for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
      Raw<T, V> in[kGroup], beside[kGroup];
      read_group<T, V, pool>(in, x, g, p.pool_width, p.rows, p.c, part.first);
      if (!mapped && residual) read_group<T, V, pool>(beside, residual, g, 0, p.rows, p.c, part.first);
      uint32_t bits = 0;
      A top[V] = {};
      int which[V] = {};
      Pack<T, V> result;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int64_t row = row_of<pool>(g, j, p.pool_width);
        if (row >= p.rows) continue;
        const Pack<T, V> value = unpacked<T, V>(in[j]);
        Pack<T, V> add = {};
        if (!mapped && residual) add = unpacked<T, V>(beside[j]);
        for (int k = 0; mapped && residual && k < V; ++k)
          add.v[k] = source[k] < 0 ? narrow<T>(A(0)) : residual[row * p.residual_width + source[k]];
        for (int k = 0; k < V; ++k) {
          A a = bn_value(wide<A>(value.v[k]), mean[k], scale[k], shift[k]);
          if (residual) a += wide<A>(add.v[k]);
          sum[k] += a < 0 ? -a : a;
          if constexpr (pool) {  // the first of the largest, as max_pool2d has it, or the last that is no number
            a = wide<A>(narrow<T>(a));
            const bool better = j == 0 || a > top[k] || a != a;
            top[k] = better ? a : top[k];
            which[k] = better ? j : which[k];
          } else {
            bits |= static_cast<uint32_t>(act_passes(a, lowest)) << (j * V + k);
            result.v[k] = narrow<T>(act_value(a, lowest));
          }
        }
        if constexpr (!pool) write(out + row * p.c + part.first, result);
      }
      if constexpr (pool) {
        for (int k = 0; k < V; ++k) {
          bits |= static_cast<uint32_t>(act_passes(top[k], lowest)) << (which[k] * V + k);
          result.v[k] = narrow<T>(act_value(top[k], lowest));
        }
        write(out + g * p.c + part.first, result);
      }
      gate[g * (p.c / V) + part.first / V] = static_cast<Gate<V>>(bits);
    }
  }
  if (measure) reduce<A, V>(sum, static_cast<A*>(p.partial), p.c, 0);
}

template <typename A>
__global__ void act_kernel(BnAct p, int64_t chunks) {
  if (p.measure && !*p.measure) return;
  const int64_t f = lane_filter(), i = f < p.c_out ? position(p.live, p.c, f) : -1;
  const double seen = total(static_cast<const A*>(p.partial), chunks, p.c, i, 0) / p.rows;
  if (f >= p.c_out || threadIdx.y != 0) return;
  p.act[f] = static_cast<float>(running(p.act[f], seen, 1 - p.act_keep));
}

template <typename T, typename A, int V, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks)
gradient_sums_kernel(BnActBackward p, const T* __restrict__ grad, const T* __restrict__ x,
                     const Gate<V>* __restrict__ gate, const A* __restrict__ means) {
  const Part<V> part(p.rows, p.c);
  A sum[V] = {}, sum_x[V] = {}, mean[V] = {};
  if (part.any) {
    read(mean, means + part.first);
    for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
      Raw<T, V> above[kGroup], in[kGroup];
      const uint32_t bits = gate[g * (p.c / V) + part.first / V];
      read_gradient<T, V, pool>(above, grad, g, p.rows, p.c, part.first);
      read_group<T, V, pool>(in, x, g, p.pool_width, p.rows, p.c, part.first);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (pool || g * kGroup + j < p.rows) {
          const Pack<T, V> full = unpacked<T, V>(above[pool ? 0 : j]), value = unpacked<T, V>(in[j]);
          for (int k = 0; k < V; ++k) {
            const A gated = bits >> (j * V + k) & 1 ? wide<A>(full.v[k]) : A(0);
            sum[k] += gated;
            sum_x[k] += gated * (wide<A>(value.v[k]) - mean[k]);
          }
        }
    }
  }
  reduce<A, V>(sum, static_cast<A*>(p.partial), p.c, 0);
  reduce<A, V>(sum_x, static_cast<A*>(p.partial), p.c, 1);
}

template <typename A>
__global__ void coefficients_kernel(BnActBackward p, int64_t chunks) {
  const int64_t f = lane_filter(), i = f < p.c_out ? position(p.live, p.c, f) : -1;
  const A* partial = static_cast<const A*>(p.partial);
  const double sum = total(partial, chunks, p.c, i, 0), sum_x = total(partial, chunks, p.c, i, 1);
  if (f >= p.c_out || threadIdx.y != 0) return;
  A *dgamma = static_cast<A*>(p.dgamma), *dbeta = static_cast<A*>(p.dbeta);
  dgamma[f] = dbeta[f] = 0;
  if (i < 0) return;
  const double invstd = static_cast<const A*>(p.invstd)[i];
  const BnGradient k = bn_gradient(sum, sum_x, static_cast<const A*>(p.gamma)[f], invstd, static_cast<double>(p.rows),
                                   p.training);
  dgamma[f] = static_cast<A>(sum_x * invstd);
  dbeta[f] = static_cast<A>(sum);
  A* coefficients = static_cast<A*>(p.coefficients);
  coefficients[i] = static_cast<A>(k.ka);
  coefficients[p.c + i] = static_cast<A>(k.kb);
  coefficients[2 * p.c + i] = static_cast<A>(k.kc);
}

template <typename T, typename A, int V, bool mapped, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks)
gradient_kernel(BnActBackward p, const T* __restrict__ grad, const T* __restrict__ x, const Gate<V>* __restrict__ gate,
                const A* __restrict__ means, const A* __restrict__ coefficients, T* __restrict__ dx,
                T* __restrict__ dresidual) {
  const Part<V> part(p.rows, p.c);
  if (!part.any) return;
  A mean[V], ka[V], kb[V], kc[V];
  int source[V];
  read(mean, means + part.first);
  read(ka, coefficients + part.first);
  read(kb, coefficients + p.c + part.first);
  read(kc, coefficients + 2 * p.c + part.first);
  if constexpr (mapped) sources(source, p.residual_map, part.first);
  for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
    Raw<T, V> above[kGroup], in[kGroup];
    const uint32_t bits = gate[g * (p.c / V) + part.first / V];
    read_gradient<T, V, pool>(above, grad, g, p.rows, p.c, part.first);
    read_group<T, V, pool>(in, x, g, p.pool_width, p.rows, p.c, part.first);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t row = row_of<pool>(g, j, p.pool_width);
      if (row >= p.rows) continue;
      const Pack<T, V> full = unpacked<T, V>(above[pool ? 0 : j]), value = unpacked<T, V>(in[j]);
      Pack<T, V> result, gated;
      for (int k = 0; k < V; ++k) {
        gated.v[k] = bits >> (j * V + k) & 1 ? full.v[k] : narrow<T>(A(0));
        result.v[k] = narrow<T>(bn_dx(wide<A>(gated.v[k]), wide<A>(value.v[k]), mean[k], ka[k], kb[k], kc[k]));
      }
      write(dx + row * p.c + part.first, result);
      if (!dresidual) continue;
      if constexpr (!mapped) {
        write(dresidual + row * p.c + part.first, gated);
      } else {
        for (int k = 0; k < V; ++k)
          if (source[k] >= 0) dresidual[row * p.residual_width + source[k]] = gated.v[k];
      }
    }
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a map is divided among blocks: of columns by rows of threads, each with V channels and kGroup rows at a time.
struct Shape {
  int64_t columns, chunks, free_chunks;  // free_chunks: where nothing is added up, and each may be short
  dim3 block;
  Shape(int64_t rows, int64_t c, int64_t vector) {
    int64_t wide = 1;
    while (wide < kColumns && wide * vector < c) wide *= 2;
    const int64_t high = kThreads / wide, all = std::max<int64_t>(1, divide_up(divide_up(rows, kGroup), high));
    columns = divide_up(c, wide * vector);
    chunks = std::min(all, kSums);
    free_chunks = std::min({all, std::max(kSums, divide_up(all, 2)), kMostChunks});
    block = dim3(static_cast<unsigned>(wide), static_cast<unsigned>(high));
  }
  dim3 grid(int64_t chunks) const { return dim3(static_cast<unsigned>(columns), static_cast<unsigned>(chunks)); }
};

template <typename T, typename A, int V, bool mapped, bool pool>
void forward(const BnAct& p, cudaStream_t stream) {
  const Shape shape(p.rows, p.c, V);
  const dim3 filters(static_cast<unsigned>(divide_up(p.c_out, kLanes))), lanes(kLanes, kSlices);
  const dim3 summed = shape.grid(shape.chunks), grid = p.act ? summed : shape.grid(shape.free_chunks);
  const bool any = p.c > 0 && p.rows > 0;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const A *mean = static_cast<const A*>(p.mean), *coefficients = static_cast<const A*>(p.coefficients);
  T* out = static_cast<T*>(p.out);
  Gate<V>* gate = static_cast<Gate<V>*>(p.gate);
  if (p.training && any) moments_kernel<T, A, V><<<summed, shape.block, 0, stream>>>(p, x);
  if (p.c_out > 0) statistics_kernel<T, A><<<filters, lanes, 0, stream>>>(p, shape.chunks);
  if (any)
    apply_kernel<T, A, V, mapped, pool><<<grid, shape.block, 0, stream>>>(p, x, residual, mean, coefficients, out,
                                                                          gate);
  if (p.act && p.c_out > 0 && p.rows > 0) act_kernel<A><<<filters, lanes, 0, stream>>>(p, shape.chunks);
}

template <typename T, typename A, int V, bool mapped, bool pool>
void backward(const BnActBackward& p, cudaStream_t stream) {
  const Shape shape(p.rows, p.c, V);
  const dim3 filters(static_cast<unsigned>(divide_up(p.c_out, kLanes))), lanes(kLanes, kSlices);
  const dim3 summed = shape.grid(shape.chunks), grid = shape.grid(shape.free_chunks);
  const bool any = p.c > 0 && p.rows > 0;
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  const A *mean = static_cast<const A*>(p.mean), *coefficients = static_cast<const A*>(p.coefficients);
  const Gate<V>* gate = static_cast<const Gate<V>*>(p.gate);
  T *dx = static_cast<T*>(p.dx), *dresidual = static_cast<T*>(p.dresidual);
  if (any) gradient_sums_kernel<T, A, V, pool><<<summed, shape.block, 0, stream>>>(p, grad, x, gate, mean);
  if (p.c_out > 0) coefficients_kernel<A><<<filters, lanes, 0, stream>>>(p, any ? shape.chunks : 0);
  if (any)
    gradient_kernel<T, A, V, mapped, pool><<<grid, shape.block, 0, stream>>>(p, grad, x, gate, mean, coefficients, dx,
                                                                            dresidual);
}

template <typename T, typename A>
void forward(const BnAct& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (p.pool_width) p.c % V ? forward<T, A, 1, false, true>(p, stream) : forward<T, A, V, false, true>(p, stream);
  else if (p.c % V) forward<T, A, 1, true, false>(p, stream);
  else if (p.residual_map) forward<T, A, V, true, false>(p, stream);
  else forward<T, A, V, false, false>(p, stream);
}

template <typename T, typename A>
void backward(const BnActBackward& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (p.pool_width) p.c % V ? backward<T, A, 1, false, true>(p, stream) : backward<T, A, V, false, true>(p, stream);
  else if (p.c % V) backward<T, A, 1, true, false>(p, stream);
  else if (p.residual_map) backward<T, A, V, true, false>(p, stream);
  else backward<T, A, V, false, false>(p, stream);
}

int64_t vector_of(Type type, int64_t c) {
  const int64_t vector = type == Type::kDouble ? 2 : type == Type::kFloat ? 4 : 8;
  return c % vector ? 1 : vector;
}

}  // namespace

int64_t bn_chunks(Type type, int64_t rows, int64_t c) { return Shape(rows, c, vector_of(type, c)).chunks; }

int64_t bn_gate_bytes(Type type, int64_t rows, int64_t c) {
  return divide_up(rows, kGroup) * (vector_of(type, c) == 1 ? c : c / 2);
}

cudaError_t launch_bn_act(const BnAct& p, cudaStream_t stream) {
  switch (p.type) {
    case Type::kFloat: forward<float, float>(p, stream); break;
    case Type::kDouble: forward<double, double>(p, stream); break;
    case Type::kHalf: forward<__half, float>(p, stream); break;
    case Type::kBFloat16: forward<__nv_bfloat16, float>(p, stream); break;
  }
  return cudaGetLastError();
}

cudaError_t launch_bn_act_backward(const BnActBackward& p, cudaStream_t stream) {
  switch (p.type) {
    case Type::kFloat: backward<float, float>(p, stream); break;
    case Type::kDouble: backward<double, double>(p, stream); break;
    case Type::kHalf: backward<__half, float>(p, stream); break;
    case Type::kBFloat16: backward<__nv_bfloat16, float>(p, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace gst
