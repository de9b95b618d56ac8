// How the kernels compiled as C++ are called: on copies of a launch's buffers, each just before a
// page that may not be touched. Reading or writing past a buffer's end is found, but for up to 31
// bytes that keep it aligned, of which only writing is, by what they held; outputs begin as NaN,
// and what is const must stay as it was.
#pragma once
#include <csignal>
#include <sys/mman.h>

#include "emulate.h"
#include "launch.h"

namespace emulate {

inline void on_fault(int, siginfo_t*, void*) {
  complain("memory past the end of a buffer");
  running->started = false, running->state = Fiber::kIdle;
  _longjmp(scheduler, 1);
}

class Buffers {
  struct Buffer {
    char *pages, *copy, *original;
    size_t size, bytes;
    bool written;
  };
  std::vector<Buffer> all;
  struct sigaction before;

 public:
  Buffers() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
  }
  Buffers(const Buffers&) = delete;

  // input: it must stay as it is; output: it begins as NaN; an updated one is neither.
  template <typename P>
  void take(P*& pointer, size_t bytes, bool output = false, bool input = std::is_const_v<P>) {
    if (!pointer || !bytes) return;
    const size_t page = 4096, room = (bytes + 32 + page - 1) / page * page;
    char* pages = static_cast<char*>(
        mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages + room, page, PROT_NONE);
    std::memset(pages, 0xff, room);
    char* copy = pages + (room - bytes) / 32 * 32;
    char* original = const_cast<char*>(reinterpret_cast<const char*>(pointer));
    if (!output) std::memcpy(copy, original, bytes);
    all.push_back({pages, copy, original, room, bytes, !input});
    pointer = reinterpret_cast<P*>(copy);
  }

  ~Buffers() {
    sigaction(SIGSEGV, &before, nullptr);
    for (const Buffer& b : all) {
      for (const char* p = b.copy + b.bytes; p < b.pages + b.size; ++p)
        if (*p != '\xff') complain("memory past the end of a buffer is written");
      if (b.written) std::memcpy(b.original, b.copy, b.bytes);
      else if (std::memcmp(b.original, b.copy, b.bytes)) complain("an input is written");
      munmap(b.pages, b.size + 4096);
    }
  }
};

}  // namespace emulate

#define EMULATED extern "C" __attribute__((visibility("default")))

EMULATED const char* emulated_bn_act(gst::BnAct p, bool backward) {
  emulate::complaint.clear();
  {
    emulate::Buffers buffers;
    const size_t A = p.type == gst::Type::kDouble ? 8 : 4;
    const size_t T = p.type == gst::Type::kBFloat16 ? 2 : A;
    const size_t map = T * p.rows * p.c, pooled = map / (p.pool_width ? 4 : 1);
    const size_t residual = p.residual_channels > 0 ? T * p.rows * p.residual_channels : 0;
    for (const int64_t** v : {&p.live, &p.residual_map}) buffers.take(*v, 8 * p.c);
    for (const void** v : {&p.gamma, &p.beta, &p.bias}) buffers.take(*v, A * p.c_out);
    for (void** v : {&p.running_mean, &p.running_var}) buffers.take(*v, A * p.c_out);
    for (void** v : {&p.dgamma, &p.dbeta}) buffers.take(*v, A * p.c_out, true);
    for (void** v : {&p.mean, &p.invstd}) buffers.take(*v, A * p.c, !backward, backward);
    buffers.take(p.relu_bits, gst::relu_bits_bytes(p.type, p.rows, p.c), !backward, backward);
    buffers.take(p.act, 4 * p.c_out);
    buffers.take(p.x, map);
    buffers.take(p.dx, map, true);
    buffers.take(p.out, pooled, true);
    buffers.take(p.grad, pooled);
    buffers.take(p.residual, residual);
    buffers.take(p.dresidual, residual);
    buffers.take(p.coefficients, A * 3 * p.c, true);
    buffers.take(p.partial, A * 2 * gst::bn_chunks(p.type, p.rows, p.c) * p.c, true);
    gst::launch_bn_act(p, backward, nullptr);
  }
  return emulate::complaint.c_str();
}

EMULATED const char* emulated_ebn_score(
    const double* gamma, const double* beta, double* score, int64_t n, bool is_signed) {
  emulate::complaint.clear();
  {
    emulate::Buffers buffers;
    for (const double** v : {&gamma, &beta}) buffers.take(*v, 8 * n);
    buffers.take(score, 8 * n, true);
    gst::launch_ebn_score(gamma, beta, score, n, is_signed, nullptr);
  }
  return emulate::complaint.c_str();
}

EMULATED int64_t emulated_chunks(gst::Type type, int64_t rows, int64_t c) {
  return gst::bn_chunks(type, rows, c);
}
EMULATED int64_t emulated_bits_bytes(gst::Type type, int64_t rows, int64_t c) {
  return gst::relu_bits_bytes(type, rows, c);
}
EMULATED void emulated_order(int order) { emulate::order = order; }
EMULATED void emulated_fault(int fault) { emulate::fault = fault; }
EMULATED int64_t emulated_count(int what) {
  return what == 0 ? emulate::launches : what == 1 ? emulate::barriers : emulate::shared_accesses;
}
