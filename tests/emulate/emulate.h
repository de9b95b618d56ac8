// What csrc/cuda needs of CUDA, in plain C++ on one core: each GPU thread of a block is a fiber
// that runs to the next barrier. `complaint` has the first of these: a barrier that not all threads
// of a block reach, at one place; two threads at one cell of shared memory between two barriers,
// one of them writing; a cell that is read before it is written, or does not exist; a launch or
// vector that a GPU refuses. A GPU may take blocks and threads in any order, and all must give the
// same bits: `order` chooses one. This tells nothing of speed, nor of what a compiler for GPUs
// does.
#pragma once
#include <c10/util/BFloat16.h>
#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulate::barrier(__LINE__)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;
using __nv_bfloat16 = c10::BFloat16;

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kMostThreads = 1024;

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t first;
  jmp_buf at;
  dim3 index;
  unsigned number;
  enum { kIdle, kRunning, kWaiting } state = kIdle;
  bool started = false;
  int line = 0;  // of the barrier it waits at
};

inline std::string complaint;
inline int fault = 0;  // the number of a planted fault that is active
inline int order = 0;  // 0: ascending, 1: descending, others: shuffled by this number
inline int64_t launches = 0, barriers = 0, shared_accesses = 0;
inline int64_t epoch = 1, block = 0;  // between which barriers, and in which block, this is
inline std::function<void()> body;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running = nullptr;
inline jmp_buf scheduler;

inline void complain(const std::string& what) {
  if (complaint.empty())
    complaint = what + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
        "; thread " + std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ")";
}

inline void leave() {
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
  threadIdx = running->index;
}

inline void barrier(int line) {
  running->state = Fiber::kWaiting;
  running->line = line;
  leave();
}

// A fiber's whole life: one thread of a block after the other.
inline void live() {
  for (;;) {
    body();
    running->state = Fiber::kIdle;
    leave();
  }
}

inline void enter(Fiber& fiber) {
  running = &fiber;
  fiber.state = Fiber::kRunning;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStack;
  makecontext(&fiber.first, live, 0);
  setcontext(&fiber.first);
}

inline std::vector<unsigned> ordered(unsigned n, int64_t salt) {
  std::vector<unsigned> all(n);
  for (unsigned i = 0; i < n; ++i) all[i] = order == 1 ? n - 1 - i : i;
  if (order > 1) std::shuffle(all.begin(), all.end(), std::mt19937(order + salt));
  return all;
}

inline void run_block() {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  ++block, ++epoch;
  for (unsigned i = fibers.size(); i < n; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers[i]->stack.reset(new char[kStack]);
    fibers[i]->number = i;
  }
  for (unsigned i = 0; i < n; ++i)
    fibers[i]->index =
        dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  for (int64_t round = 0;; ++round) {
    unsigned waiting = 0;
    bool together = true;
    for (unsigned i : ordered(n, round))
      if (round == 0 || fibers[i]->state == Fiber::kWaiting) enter(*fibers[i]);
    for (unsigned i = 0; i < n; ++i) {
      waiting += fibers[i]->state == Fiber::kWaiting;
      together = together && fibers[i]->line == fibers[0]->line;
    }
    if (waiting == 0) return;
    ++barriers, ++epoch;
    if (waiting == n && together) continue;
    complain("a barrier that not all threads of the block reach together");
    for (auto& fiber : fibers)
      fiber->started = false, fiber->state = Fiber::kIdle;  // what they were at is dropped
    return;
  }
}

template <typename F>
void launch(const F& kernel, dim3 grid, dim3 threads, int, cudaStream_t) {
  ++launches;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u ||
      !threads.x || !threads.y || !threads.z || threads.x * threads.y * threads.z > kMostThreads)
    return complain("a launch of a size that a GPU refuses");
  gridDim = grid, blockDim = threads;
  body = kernel;
  for (unsigned y : ordered(grid.y, 1))
    for (unsigned x : ordered(grid.x, 2)) {
      blockIdx = dim3(x, y, 0);
      run_block();
    }
}

template <typename T>
struct Cell {
  T value;
  int64_t set_in = 0, written = 0, read = 0;  // the block that set it, and epochs
  unsigned writer = 0, reader = 0;
  bool readers = false;  // more than one in that epoch
};

template <typename T>
struct Access {
  Cell<T>& cell;
  operator T() const {
    ++shared_accesses;
    if (cell.set_in != block) complain("shared memory that is read before it is written");
    if (cell.written == epoch && cell.writer != running->number)
      complain("a race: shared memory written, then read");
    cell.readers = cell.read == epoch && (cell.readers || cell.reader != running->number);
    cell.read = epoch, cell.reader = running->number;
    return cell.value;
  }
  Access& operator=(T value) {
    ++shared_accesses;
    if (cell.written == epoch && cell.writer != running->number)
      complain("a race: shared memory written twice");
    if (cell.read == epoch && (cell.readers || cell.reader != running->number))
      complain("a race: shared memory read, then written");
    cell.value = value, cell.set_in = block, cell.written = epoch, cell.writer = running->number;
    return *this;
  }
};

// __shared__ T name[rows][columns]: one for all threads, as blocks run one after the other.
template <typename T, int rows, int columns>
struct Shared {
  Cell<T> cells[rows * columns + 1];  // the last for what does not exist
  struct Row {
    Shared& shared;
    int64_t row;
    Access<T> operator[](int64_t column) const {
      const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
      if (!inside) complain("shared memory beyond its bounds");
      return {shared.cells[inside ? row * columns + column : rows * columns]};
    }
  };
  Row operator[](int64_t row) { return {*this, row}; }
};

}  // namespace emulate

inline cudaError_t cudaGetLastError() {
  return emulate::complaint.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline void __stwb(uint4* to, uint4 value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(uint4))
    return emulate::complain("a vector that is not aligned");
  std::memcpy(to, &value, sizeof(value));
}
