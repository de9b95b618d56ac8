// Batch norm + shortcut + mean |a| + ReLU on the GPU. Sums are taken in two stages, chunks of rows and then the chunks
// in order, without atomics, so they repeat exactly. No torch headers here: they would take nvcc a minute.
#include "bn_act.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "../gst_math.h"

namespace gst {
namespace {

constexpr int kColumns = 16, kRows = 16;  // threads of a block: 16 of them read 256 bytes of a row
constexpr int kLanes = 32, kSlices = 16;  // of a block that adds up chunks: a lane a filter, in slices of its chunks

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

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

// The rows and channels of this thread: V channels from `first`, rows begin + threadIdx.y, + kRows, … below end.
template <int V>
struct Part {
  int64_t first, begin, end;
  bool any;
  __device__ Part(int64_t rows, int64_t c) {
    const int64_t chunk = (rows + gridDim.y - 1) / gridDim.y;
    first = (static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x) * V;
    begin = blockIdx.y * chunk;
    end = begin + chunk < rows ? begin + chunk : rows;
    any = first < c;
  }
};

// Adds up one value per channel over the block's rows of threads, in order, and leaves it in partial[slot].
template <typename A, int V>
__device__ void reduce(const A (&sum)[V], A* partial, const Part<V>& part, int64_t c, int slot) {
  __shared__ A shared[kRows][kColumns * V];
  __syncthreads();  // an earlier reduction may still be read
  for (int k = 0; k < V; ++k) shared[threadIdx.y][threadIdx.x * V + k] = sum[k];
  __syncthreads();
  if (threadIdx.y != 0 || !part.any) return;
  for (int k = 0; k < V; ++k) {
    A total = 0;
    for (int y = 0; y < kRows; ++y) total += shared[y][threadIdx.x * V + k];
    partial[(static_cast<int64_t>(blockIdx.y) * 2 + slot) * c + part.first + k] = total;
  }
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

// Which of the c live filters filter f is; -1 if it is pruned.
__device__ int64_t position(const int64_t* live, int64_t c, int64_t f) {
  if (!live) return f;
  int64_t low = 0, high = c;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (live[middle] < f) low = middle + 1;
    else high = middle;
  }
  return low < c && live[low] == f ? low : -1;
}

template <typename A>
__device__ A lowest_value(bool relu) {
  return relu ? A(0) : -static_cast<A>(INFINITY);
}

template <typename T, typename A, int V>
__global__ void moments_kernel(BnAct p) {
  const Part<V> part(p.rows, p.c);
  const T* x = static_cast<const T*>(p.x);
  A sum[V] = {}, sum2[V] = {}, pilot[V] = {};
  if (part.any) {
    for (int k = 0; k < V; ++k) pilot[k] = wide<A>(x[part.first + k]);
    for (int64_t r = part.begin + threadIdx.y; r < part.end; r += kRows) {
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + r * p.c + part.first);
      for (int k = 0; k < V; ++k) {
        const A d = wide<A>(pack.v[k]) - pilot[k];
        sum[k] += d;
        sum2[k] += d * d;
      }
    }
  }
  reduce<A, V>(sum, static_cast<A*>(p.partial), part, p.c, 0);
  reduce<A, V>(sum2, static_cast<A*>(p.partial), part, p.c, 1);
}

// The filter of this thread's lane.
__device__ int64_t lane_filter() { return static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x; }

// One lane for each filter: the statistics of the live ones, and what all running statistics become.
template <typename T, typename A>
__global__ void statistics_kernel(BnAct p, int64_t chunks) {
  const int64_t f = lane_filter(), i = f < p.c_out ? position(p.live, p.c, f) : -1;
  A *mean = static_cast<A*>(p.mean), *invstd = static_cast<A*>(p.invstd);
  A *running_mean = static_cast<A*>(p.running_mean), *running_var = static_cast<A*>(p.running_var);
  if (!p.training) {
    if (i < 0 || threadIdx.y != 0) return;
    mean[i] = running_mean[f];
    invstd[i] = static_cast<A>(1 / sqrt(running_var[f] + p.eps));
    return;
  }
  const A* partial = static_cast<const A*>(p.partial);
  const double sum = total(partial, chunks, p.c, i, 0), sum2 = total(partial, chunks, p.c, i, 1);
  if (f >= p.c_out || threadIdx.y != 0) return;
  double seen_mean = 0, seen_var = 0;
  if (i >= 0) {
    const double count = static_cast<double>(p.rows);
    const BnMoments b = bn_moments(sum, sum2, wide<A>(static_cast<const T*>(p.x)[i]), count, p.eps);
    mean[i] = static_cast<A>(b.mean);
    invstd[i] = static_cast<A>(b.invstd);
    seen_mean = b.mean, seen_var = unbiased(b.var, count);
  }
  running_mean[f] = static_cast<A>(running(running_mean[f], seen_mean, p.momentum));
  running_var[f] = static_cast<A>(running(running_var[f], seen_var, p.momentum));
}

template <typename T, typename A, int V>
__global__ void apply_kernel(BnAct p) {
  const Part<V> part(p.rows, p.c);
  const bool measure = p.act && (!p.measure || *p.measure);
  const A lowest = lowest_value<A>(p.relu);
  A sum[V] = {};
  if (part.any) {
    A mean[V], scale[V], shift[V];
    int64_t source[V];
    for (int k = 0; k < V; ++k) {
      const int64_t i = part.first + k, f = p.live ? p.live[i] : i;
      mean[k] = static_cast<const A*>(p.mean)[i];
      scale[k] = static_cast<const A*>(p.gamma)[f] * static_cast<const A*>(p.invstd)[i];
      shift[k] = static_cast<const A*>(p.beta)[f];
      source[k] = p.residual_map ? p.residual_map[i] : i;
    }
    const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
    for (int64_t r = part.begin + threadIdx.y; r < part.end; r += kRows) {
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + r * p.c + part.first);
      Pack<T, V> add, out;
      if (residual && V > 1) add = *reinterpret_cast<const Pack<T, V>*>(residual + r * p.c + part.first);
      else if (residual && source[0] >= 0) add.v[0] = residual[r * p.residual_width + source[0]];
      for (int k = 0; k < V; ++k) {
        A a = bn_value(wide<A>(pack.v[k]), mean[k], scale[k], shift[k]);
        if (residual && source[k] >= 0) a += wide<A>(add.v[k]);
        sum[k] += a < 0 ? -a : a;
        out.v[k] = narrow<T>(act_value(a, lowest));
      }
      *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.out) + r * p.c + part.first) = out;
    }
  }
  if (measure) reduce<A, V>(sum, static_cast<A*>(p.partial), part, p.c, 0);
}

template <typename A>
__global__ void act_kernel(BnAct p, int64_t chunks) {
  if (p.measure && !*p.measure) return;
  const int64_t f = lane_filter(), i = f < p.c_out ? position(p.live, p.c, f) : -1;
  const double seen = total(static_cast<const A*>(p.partial), chunks, p.c, i, 0) / p.rows;
  if (f >= p.c_out || threadIdx.y != 0) return;
  p.act[f] = static_cast<float>(running(p.act[f], seen, 1 - p.act_keep));
}

template <typename T, typename A, int V>
__global__ void gradient_sums_kernel(BnActBackward p) {
  const Part<V> part(p.rows, p.c);
  const A lowest = lowest_value<A>(p.relu);
  A sum[V] = {}, sum_x[V] = {}, mean[V] = {};
  if (part.any) {
    for (int k = 0; k < V; ++k) mean[k] = static_cast<const A*>(p.mean)[part.first + k];
    for (int64_t r = part.begin + threadIdx.y; r < part.end; r += kRows) {
      const int64_t at = r * p.c + part.first;
      const auto grad = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.grad) + at);
      const auto x = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.x) + at);
      const auto out = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.out) + at);
      for (int k = 0; k < V; ++k) {
        const A g = act_passes(wide<A>(out.v[k]), lowest) ? wide<A>(grad.v[k]) : A(0);
        sum[k] += g;
        sum_x[k] += g * (wide<A>(x.v[k]) - mean[k]);
      }
    }
  }
  reduce<A, V>(sum, static_cast<A*>(p.partial), part, p.c, 0);
  reduce<A, V>(sum_x, static_cast<A*>(p.partial), part, p.c, 1);
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

template <typename T, typename A, int V>
__global__ void gradient_kernel(BnActBackward p) {
  const Part<V> part(p.rows, p.c);
  if (!part.any) return;
  const A lowest = lowest_value<A>(p.relu);
  const A* coefficients = static_cast<const A*>(p.coefficients);
  A mean[V], ka[V], kb[V], kc[V];
  for (int k = 0; k < V; ++k) {
    const int64_t i = part.first + k;
    mean[k] = static_cast<const A*>(p.mean)[i];
    ka[k] = coefficients[i], kb[k] = coefficients[p.c + i], kc[k] = coefficients[2 * p.c + i];
  }
  const int64_t source = p.residual_map ? p.residual_map[part.first] : part.first;
  for (int64_t r = part.begin + threadIdx.y; r < part.end; r += kRows) {
    const int64_t at = r * p.c + part.first;
    const auto grad = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.grad) + at);
    const auto x = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.x) + at);
    const auto out = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.out) + at);
    Pack<T, V> dx, gated;
    for (int k = 0; k < V; ++k) {
      const A g = act_passes(wide<A>(out.v[k]), lowest) ? wide<A>(grad.v[k]) : A(0);
      gated.v[k] = narrow<T>(g);
      dx.v[k] = narrow<T>(g * ka[k] + (wide<A>(x.v[k]) - mean[k]) * kb[k] + kc[k]);
    }
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.dx) + at) = dx;
    if (!p.dresidual) continue;
    T* dresidual = static_cast<T*>(p.dresidual);
    if (V > 1) *reinterpret_cast<Pack<T, V>*>(dresidual + at) = gated;
    else if (source >= 0) dresidual[r * p.residual_width + source] = gated.v[0];
  }
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

template <typename T, typename A, int V>
void forward(const BnAct& p, cudaStream_t stream) {
  const int64_t chunks = bn_chunks(p.rows);
  const dim3 grid(blocks(p.c, kColumns * V), static_cast<unsigned>(chunks)), block(kColumns, kRows);
  const dim3 lanes(kLanes, kSlices);
  const bool any = p.c > 0 && p.rows > 0;
  if (p.training && any) moments_kernel<T, A, V><<<grid, block, 0, stream>>>(p);
  if (p.c_out > 0) statistics_kernel<T, A><<<blocks(p.c_out, kLanes), lanes, 0, stream>>>(p, chunks);
  if (any) apply_kernel<T, A, V><<<grid, block, 0, stream>>>(p);
  if (p.act && p.c_out > 0 && p.rows > 0)
    act_kernel<A><<<blocks(p.c_out, kLanes), lanes, 0, stream>>>(p, chunks);
}

template <typename T, typename A, int V>
void backward(const BnActBackward& p, cudaStream_t stream) {
  const int64_t chunks = p.rows > 0 ? bn_chunks(p.rows) : 0;
  const dim3 grid(blocks(p.c, kColumns * V), static_cast<unsigned>(chunks)), block(kColumns, kRows);
  const bool any = p.c > 0 && p.rows > 0;
  if (any) gradient_sums_kernel<T, A, V><<<grid, block, 0, stream>>>(p);
  if (p.c_out > 0)
    coefficients_kernel<A><<<blocks(p.c_out, kLanes), dim3(kLanes, kSlices), 0, stream>>>(p, chunks);
  if (any) gradient_kernel<T, A, V><<<grid, block, 0, stream>>>(p);
}

template <typename T, typename A>
void forward(const BnAct& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (p.c % V == 0 && !p.residual_map && aligned({p.x, p.residual, p.out})) forward<T, A, V>(p, stream);
  else forward<T, A, 1>(p, stream);
}

template <typename T, typename A>
void backward(const BnActBackward& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (p.c % V == 0 && !p.residual_map && aligned({p.grad, p.x, p.out, p.dx, p.dresidual})) backward<T, A, V>(p, stream);
  else backward<T, A, 1>(p, stream);
}

}  // namespace

int64_t bn_chunks(int64_t rows) {
  const int64_t chunks = (rows + 31) / 32;
  return chunks < 1 ? 1 : chunks > 256 ? 256 : chunks;
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
