// The GPU's kernels: batch norm + shortcut + mean |a| + ReLU (+ a 2x2 max-pool), and E[BN] scores.
// Sums are taken in two stages, over chunks of rows and then over the chunks in order, without
// atomics, so they repeat exactly. No PyTorch headers here, because nvcc takes a minute for them.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.h"

namespace gst {
namespace {

// Blocks that go over a map: their threads, and such blocks at a time, at least; their columns of
// threads at most, of which 16 read 256 bytes of a row; the rows that a thread reads at a time,
// enough bytes in flight or a pool's window.
constexpr int kThreads = 256, kBlocks = 2, kColumns = 16, kGroup = 4;
// Chunks of rows at most, where they are added up; blocks that a grid may have in y.
constexpr int64_t kSums = 256, kMostChunks = 65535;
// Blocks that add up chunks: a lane for each filter, a slice of the chunks for each row of threads.
constexpr int kLanes = 32, kSlices = 16;

// Parameters, sums and coefficients beside maps of T.
template <typename T>
using Parameter = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// A pack as it is read and written, 16 bytes at once: the compiler would split a pack of values.
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
using Bits = std::conditional_t<(V > 4), uint32_t, std::conditional_t<(V > 2), uint16_t, uint8_t>>;

template <typename T>
__device__ __forceinline__ Parameter<T> wide(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(x);
  else return x;
}

template <typename T>
__device__ __forceinline__ T narrow(Parameter<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

// Row j of group g: kGroup rows that follow one another or, where a pool follows, a 2x2 window of a
// map this wide.
template <bool pool>
__device__ __forceinline__ int64_t row_of(int64_t g, int j, int64_t width) {
  if constexpr (!pool) return g * kGroup + j;
  const uint32_t windows = uint32_t(width / 2), line = uint32_t(g) / windows;
  return (line * int64_t{2} + (j >> 1)) * width + (uint32_t(g) - line * windows) * int64_t{2} +
      (j & 1);
}

// This thread's part of a map: V channels from `first`, and groups begin, begin + blockDim.y, ...
// below end.
template <int V>
struct Part {
  int64_t first, begin, end;
  bool any;
  __device__ explicit Part(const BnAct& p) {
    const int64_t groups = (p.rows + kGroup - 1) / kGroup,
                  chunk = (groups + gridDim.y - 1) / gridDim.y;
    first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
    begin = blockIdx.y * chunk + threadIdx.y;
    end = (blockIdx.y + 1) * chunk < groups ? (blockIdx.y + 1) * chunk : groups;
    any = first < p.c;
  }
};

template <typename A, int V>
__device__ __forceinline__ void read(A (&values)[V], const void* from, int64_t first) {
  const auto pack = *reinterpret_cast<const Pack<A, V>*>(as<A>(from) + first);
  for (int k = 0; k < V; ++k) values[k] = pack.v[k];
}

// A group's rows; zeros past the last.
template <typename T, int V, bool pool>
__device__ __forceinline__ void read_group(
    Raw<T, V> (&raw)[kGroup], const T* map, int64_t g, const BnAct& p, int64_t first) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int64_t row = row_of<pool>(g, j, p.pool_width);
    if (row < p.rows) raw[j] = *reinterpret_cast<const Raw<T, V>*>(map + row * p.c + first);
    else raw[j] = Raw<T, V>{};
  }
}

// A group's gradient: of its rows or, where they were pooled, their one.
template <typename T, int V, bool pool>
__device__ __forceinline__ void read_gradient(
    Raw<T, V> (&raw)[kGroup], const T* grad, int64_t g, const BnAct& p, int64_t first) {
  if constexpr (pool) raw[0] = *reinterpret_cast<const Raw<T, V>*>(grad + g * p.c + first);
  else read_group<T, V, false>(raw, grad, g, p, first);
}

template <typename T, int V>
__device__ __forceinline__ void write(T* to, const Pack<T, V>& pack) {
  Raw<T, V> raw;
  memcpy(&raw, &pack, sizeof(raw));
  if constexpr (V == 1) *to = raw;
  else __stwb(reinterpret_cast<uint4*>(to), raw);  // a plain store would be split
}

// Adds up one value per channel over the block's rows of threads, in order, and leaves it in
// p.partial's `slot`.
template <typename A, int V>
__device__ void reduce(const A (&sum)[V], const BnAct& p, int slot) {
  __shared__ A shared[V][kThreads];
  const int high = blockDim.y, width = blockDim.x, thread = threadIdx.y * width + threadIdx.x;
  __syncthreads();  // an earlier reduction may still be read
  for (int k = 0; k < V; ++k) shared[k][thread] = sum[k];
  __syncthreads();
  const int column = thread % width, k = thread / width;
  const int64_t channel = (int64_t{blockIdx.x} * width + column) * V + k;
  if (k >= V || channel >= p.c) return;
  A total = 0;
  for (int y = 0; y < high; ++y) total += shared[k][y * width + column];
  as<A>(p.partial)[(int64_t{blockIdx.y} * 2 + slot) * p.c + channel] = total;
}

// The sum of a channel's chunks (0 for channel -1): each slice in order, then the slices in order.
// One thread alone would wait for 256 reads, one after the other. All threads of the block must
// call it.
template <typename A>
__device__ double total(const BnAct& p, int64_t chunks, int64_t channel, int slot) {
  __shared__ double shared[kSlices][kLanes];
  const int64_t each = (chunks + kSlices - 1) / kSlices, begin = threadIdx.y * each;
  const int64_t end = begin + each < chunks ? begin + each : chunks;
  double sum = 0;
  if (channel >= 0)
    for (int64_t k = begin; k < end; ++k) sum += as<A>(p.partial)[(k * 2 + slot) * p.c + channel];
  __syncthreads();  // an earlier total may still be read
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int y = 0; y < kSlices; ++y) sum += shared[y][threadIdx.x];
  return sum;
}

// The filter of this thread's lane.
__device__ int64_t lane_filter() { return int64_t{blockIdx.x} * kLanes + threadIdx.x; }

// Which of the live filters filter f is; -1 if it is pruned or none. Of no filter at all, the
// address is null too.
__device__ int64_t position(const BnAct& p, int64_t f) {
  if (f >= p.c_out || !p.live) return f < p.c ? f : -1;
  int64_t low = 0, high = p.c;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.live[middle] < f) low = middle + 1;
    else high = middle;
  }
  return low < p.c && p.live[low] == f ? low : -1;
}

// Forward the sums of d = x - pivot and of d * d, backward those of the gradient that ReLU let
// through, g, and of g * (x - mean).
template <typename T, int V, bool backward, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_kernel(BnAct p,
    const T* __restrict__ grad, const T* __restrict__ x, const Bits<V>* __restrict__ relu_bits) {
  using A = Parameter<T>;
  const Part<V> part(p);
  A sum[V] = {}, product[V] = {}, center[V] = {};
  if (part.any) {
    if constexpr (backward) read(center, p.mean, part.first);
    for (int k = 0; !backward && k < V; ++k) center[k] = bn_pivot(wide(x[part.first + k]));
    for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
      Raw<T, V> above[kGroup] = {}, in[kGroup];
      uint32_t bits = 0;
      if constexpr (backward) {
        bits = relu_bits[g * (p.c / V) + part.first / V];
        read_gradient<T, V, pool>(above, grad, g, p, part.first);
      }
      read_group<T, V, pool>(in, x, g, p, part.first);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (pool || g * kGroup + j < p.rows) {
          const Pack<T, V> full = unpacked<T, V>(above[pool ? 0 : j]),
                           value = unpacked<T, V>(in[j]);
          for (int k = 0; k < V; ++k) {
            const A d = wide(value.v[k]) - center[k];
            const A passed = !backward ? d : bits >> (j * V + k) & 1 ? wide(full.v[k]) : A(0);
            sum[k] += passed;
            product[k] += passed * d;
          }
        }
    }
  }
  reduce(sum, p, 0);
  reduce(product, p, 1);
}

// One lane for each filter: the statistics of the live ones, what apply_kernel multiplies by and
// adds, and what all running statistics become. A bias that is not finite makes the map NaN, as it
// does where it is added.
template <typename T>
__global__ void statistics_kernel(BnAct p, int64_t chunks) {
  using A = Parameter<T>;
  const int64_t f = lane_filter(), i = position(p, f);
  A *running_mean = as<A>(p.running_mean), *running_var = as<A>(p.running_var);
  double sum = 0, sum2 = 0;
  if (p.training) {
    sum = total<A>(p, chunks, i, 0);
    sum2 = total<A>(p, chunks, i, 1);
  }
  if (f >= p.c_out || threadIdx.y != 0) return;
  const A bias = p.bias ? as<A>(p.bias)[f] : A(0);
  A mean = running_mean[f], invstd = A(1 / sqrt(running_var[f] + p.eps));
  if (p.training) {
    double batch_mean = 0, batch_var = 0;
    if (i >= 0) {
      const double count = double(p.rows);
      const A pivot = bn_pivot(wide(as<T>(p.x)[i]));
      const BnMoments b = bn_moments(sum, sum2, pivot, count, p.eps);
      mean = A(b.mean);
      invstd = A(b.invstd);
      batch_mean = b.mean + bias, batch_var = unbiased(b.var, count);
    }
    running_mean[f] = A(running(running_mean[f], batch_mean, p.momentum));
    running_var[f] = A(running(running_var[f], batch_var, p.momentum));
  }
  if (i < 0) return;
  A* coefficients = as<A>(p.coefficients);
  as<A>(p.mean)[i] = mean;
  as<A>(p.invstd)[i] = invstd;
  coefficients[i] = as<A>(p.gamma)[f] * invstd;
  coefficients[p.c + i] = as<A>(p.beta)[f] + 0 * bias;
}

// The residual's channel for each of a thread's, -1 for none.
template <int V>
__device__ __forceinline__ void sources(
    int (&source)[V], const int64_t* residual_map, int64_t first) {
  for (int k = 0; k < V; ++k) source[k] = int(residual_map ? residual_map[first + k] : first + k);
}

template <typename T, int V, bool mapped, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks) apply_kernel(BnAct p, const T* __restrict__ x,
    const T* __restrict__ residual, T* __restrict__ out, Bits<V>* __restrict__ relu_bits) {
  using A = Parameter<T>;
  const Part<V> part(p);
  const A floor = relu_floor<A>(p.relu);
  A sum[V] = {};
  if (part.any) {
    A mean[V], scale[V], shift[V];
    int source[V];
    read(mean, p.mean, part.first);
    read(scale, p.coefficients, part.first);
    read(shift, p.coefficients, p.c + part.first);
    if constexpr (mapped) sources(source, p.residual_map, part.first);
    for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
      Raw<T, V> in[kGroup], beside[kGroup];
      read_group<T, V, pool>(in, x, g, p, part.first);
      if (!mapped && residual) read_group<T, V, pool>(beside, residual, g, p, part.first);
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
          add.v[k] = source[k] < 0 ? narrow<T>(0) : residual[row * p.residual_channels + source[k]];
        for (int k = 0; k < V; ++k) {
          A a = bn_value(wide(value.v[k]), mean[k], scale[k], shift[k]);
          if (residual) a += wide(add.v[k]);
          sum[k] += a < 0 ? -a : a;
          if constexpr (pool) {  // as max_pool2d: the first of the largest values, or the last NaN
            a = wide(narrow<T>(a));
            const bool better = j == 0 || a > top[k] || a != a;
            top[k] = better ? a : top[k];
            which[k] = better ? j : which[k];
          } else {
            bits |= uint32_t(relu_passes(a, floor)) << (j * V + k);
            result.v[k] = narrow<T>(relu_value(a, floor));
          }
        }
        if constexpr (!pool) write(out + row * p.c + part.first, result);
      }
      if constexpr (pool) {
        for (int k = 0; k < V; ++k) {
          bits |= uint32_t(relu_passes(top[k], floor)) << (which[k] * V + k);
          result.v[k] = narrow<T>(relu_value(top[k], floor));
        }
        write(out + g * p.c + part.first, result);
      }
      relu_bits[g * (p.c / V) + part.first / V] = Bits<V>(bits);
    }
  }
  if (p.act) reduce(sum, p, 0);
}

template <typename A>
__global__ void act_kernel(BnAct p, int64_t chunks) {
  const int64_t f = lane_filter(), i = position(p, f);
  const double batch_act = total<A>(p, chunks, i, 0) / p.rows;
  if (f >= p.c_out || threadIdx.y != 0) return;
  p.act[f] = float(running(p.act[f], batch_act, 1 - p.ema_decay));
}

template <typename A>
__global__ void coefficients_kernel(BnAct p, int64_t chunks) {
  const int64_t f = lane_filter(), i = position(p, f);
  const double sum = total<A>(p, chunks, i, 0), sum_x = total<A>(p, chunks, i, 1);
  if (f >= p.c_out || threadIdx.y != 0) return;
  A *dgamma = as<A>(p.dgamma), *dbeta = as<A>(p.dbeta);
  dgamma[f] = dbeta[f] = 0;
  if (i < 0) return;
  const double invstd = as<A>(p.invstd)[i], gamma = as<A>(p.gamma)[f];
  const BnGradient k = bn_gradient(sum, sum_x, gamma, invstd, double(p.rows), p.training);
  dgamma[f] = A(sum_x * invstd);
  dbeta[f] = A(sum);
  A* coefficients = as<A>(p.coefficients);
  coefficients[i] = A(k.ka);
  coefficients[p.c + i] = A(k.kb);
  coefficients[2 * p.c + i] = A(k.kc);
}

template <typename T, int V, bool mapped, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(BnAct p, const T* __restrict__ grad, const T* __restrict__ x,
        const Bits<V>* __restrict__ relu_bits, T* __restrict__ dx, T* __restrict__ dresidual) {
  using A = Parameter<T>;
  const Part<V> part(p);
  if (!part.any) return;
  A mean[V], ka[V], kb[V], kc[V];
  int source[V];
  read(mean, p.mean, part.first);
  read(ka, p.coefficients, part.first);
  read(kb, p.coefficients, p.c + part.first);
  read(kc, p.coefficients, 2 * p.c + part.first);
  if constexpr (mapped) sources(source, p.residual_map, part.first);
  for (int64_t g = part.begin; g < part.end; g += blockDim.y) {
    Raw<T, V> above[kGroup], in[kGroup];
    const uint32_t bits = relu_bits[g * (p.c / V) + part.first / V];
    read_gradient<T, V, pool>(above, grad, g, p, part.first);
    read_group<T, V, pool>(in, x, g, p, part.first);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t row = row_of<pool>(g, j, p.pool_width);
      if (row >= p.rows) continue;
      const Pack<T, V> full = unpacked<T, V>(above[pool ? 0 : j]), value = unpacked<T, V>(in[j]);
      Pack<T, V> result, passed;
      for (int k = 0; k < V; ++k) {
        passed.v[k] = bits >> (j * V + k) & 1 ? full.v[k] : narrow<T>(0);
        result.v[k] =
            narrow<T>(bn_dx(wide(passed.v[k]), wide(value.v[k]), mean[k], ka[k], kb[k], kc[k]));
      }
      write(dx + row * p.c + part.first, result);
      if (!dresidual) continue;
      if constexpr (!mapped) {
        write(dresidual + row * p.c + part.first, passed);
      } else {
        for (int k = 0; k < V; ++k)
          if (source[k] >= 0) dresidual[row * p.residual_channels + source[k]] = passed.v[k];
      }
    }
  }
}

__global__ void ebn_score_kernel(
    const double* gamma, const double* beta, double* score, int64_t n, bool is_signed) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) score[i] = ebn_score(gamma[i], beta[i], is_signed);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a map is divided among blocks: of columns by rows of threads, each with V channels and kGroup
// rows at a time.
struct Shape {
  int64_t columns, chunks,
      free_chunks;  // free_chunks: where nothing is added up, and each may be short
  dim3 block;
  Shape(int64_t rows, int64_t c, int64_t vector) {
    int64_t width = 1;
    while (width < kColumns && width * vector < c) width *= 2;
    const int64_t high = kThreads / width,
                  all = std::max<int64_t>(1, divide_up(divide_up(rows, kGroup), high));
    columns = divide_up(c, width * vector);
    chunks = std::min(all, kSums);
    free_chunks = std::min({all, std::max(kSums, divide_up(all, 2)), kMostChunks});
    block = dim3(unsigned(width), unsigned(high));
  }
  dim3 grid(int64_t chunks) const { return dim3(unsigned(columns), unsigned(chunks)); }
};

template <typename T, int V, bool mapped, bool pool>
void run(const BnAct& p, bool backward, cudaStream_t stream) {
  using A = Parameter<T>;
  const Shape shape(p.rows, p.c, V);
  const dim3 filters(unsigned(divide_up(p.c_out, kLanes))), lanes(kLanes, kSlices);
  const dim3 summed = shape.grid(shape.chunks),
             grid = p.act ? summed : shape.grid(shape.free_chunks);
  const bool any = p.c > 0 && p.rows > 0;
  const int64_t chunks = any ? shape.chunks : 0;
  const T *x = as<T>(p.x), *grad = as<T>(p.grad);
  const T* residual = as<T>(p.residual);
  T *out = as<T>(p.out), *dx = as<T>(p.dx), *dresidual = as<T>(p.dresidual);
  Bits<V>* bits = as<Bits<V>>(p.relu_bits);
  if (backward) {
    if (any) sums_kernel<T, V, true, pool><<<summed, shape.block, 0, stream>>>(p, grad, x, bits);
    if (p.c_out > 0) coefficients_kernel<A><<<filters, lanes, 0, stream>>>(p, chunks);
    if (any)
      gradient_kernel<T, V, mapped, pool>
          <<<grid, shape.block, 0, stream>>>(p, grad, x, bits, dx, dresidual);
    return;
  }
  if (p.training && any)
    sums_kernel<T, V, false, false><<<summed, shape.block, 0, stream>>>(p, grad, x, bits);
  if (p.c_out > 0) statistics_kernel<T><<<filters, lanes, 0, stream>>>(p, chunks);
  if (any)
    apply_kernel<T, V, mapped, pool><<<grid, shape.block, 0, stream>>>(p, x, residual, out, bits);
  if (p.act && p.c_out > 0 && p.rows > 0) act_kernel<A><<<filters, lanes, 0, stream>>>(p, chunks);
}

int64_t vector_of(Type type, int64_t c) {
  const int64_t vector = type == Type::kDouble ? 2 : type == Type::kFloat ? 4 : 8;
  return c % vector ? 1 : vector;
}

template <typename T>
void run(const BnAct& p, bool backward, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool single = vector_of(p.type, p.c) == 1;
  if (p.pool_width && single) run<T, 1, false, true>(p, backward, stream);
  else if (p.pool_width) run<T, V, false, true>(p, backward, stream);
  else if (single) run<T, 1, true, false>(p, backward, stream);
  else if (p.residual_map) run<T, V, true, false>(p, backward, stream);
  else run<T, V, false, false>(p, backward, stream);
}

}  // namespace

int64_t bn_chunks(Type type, int64_t rows, int64_t c) {
  return Shape(rows, c, vector_of(type, c)).chunks;
}

int64_t relu_bits_bytes(Type type, int64_t rows, int64_t c) {
  return divide_up(rows, kGroup) * (vector_of(type, c) == 1 ? c : c / 2);
}

cudaError_t launch_bn_act(const BnAct& p, bool backward, cudaStream_t stream) {
  switch (p.type) {
    case Type::kFloat: run<float>(p, backward, stream); break;
    case Type::kDouble: run<double>(p, backward, stream); break;
    case Type::kBFloat16: run<__nv_bfloat16>(p, backward, stream); break;
  }
  return cudaGetLastError();
}

cudaError_t launch_ebn_score(const double* gamma, const double* beta, double* score, int64_t n,
    bool is_signed, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int kBlock = 128;
  ebn_score_kernel<<<(n + kBlock - 1) / kBlock, kBlock, 0, stream>>>(
      gamma, beta, score, n, is_signed);
  return cudaGetLastError();
}

}  // namespace gst
