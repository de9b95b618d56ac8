// How the kernels compiled as C++ are called: on copies of a launch's buffers, each just before a page that may not be
// touched. Reading or writing past a buffer's end is found, but for up to 31 bytes that keep it aligned, of which only
// writing is, by what they held; outputs begin as NaN, and what is const must stay as it was.
#pragma once
#include <csignal>
#include <sys/mman.h>

#include "bn_act.h"
#include "ebn_score.h"
#include "emulate.h"

namespace emulate {

inline void on_fault(int, siginfo_t*, void*) {
  complain("memory past the end of a buffer");
  running->started = false;
  running->state = Fiber::kIdle;
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

  template <typename P>
  void take(P*& pointer, size_t bytes, bool fresh = false) {
    if (!pointer || !bytes) return;
    const size_t page = 4096, room = (bytes + 32 + page - 1) / page * page;
    char* pages = static_cast<char*>(mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                                          0));
    mprotect(pages + room, page, PROT_NONE);
    std::memset(pages, 0xff, room);
    char* copy = pages + (room - bytes) / 32 * 32;
    char* original = const_cast<char*>(reinterpret_cast<const char*>(pointer));
    if (!fresh) std::memcpy(copy, original, bytes);
    all.push_back({pages, copy, original, room, bytes, !std::is_const_v<P>});
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

inline size_t map_bytes(gst::Type type) { return type == gst::Type::kDouble ? 8 : type == gst::Type::kFloat ? 4 : 2; }
inline size_t parameter_bytes(gst::Type type) { return type == gst::Type::kDouble ? 8 : 4; }

}  // namespace emulate

#define EMULATED extern "C" __attribute__((visibility("default")))

EMULATED const char* emulated_bn_act(gst::BnAct p) {
  emulate::complaint.clear();
  {
    emulate::Buffers buffers;
    const size_t T = emulate::map_bytes(p.type), A = emulate::parameter_bytes(p.type);
    buffers.take(p.live, 8 * p.c);
    buffers.take(p.x, T * p.rows * p.c);
    buffers.take(p.residual, T * p.rows * p.residual_width);
    buffers.take(p.residual_map, 8 * p.c);
    for (const void** v : {&p.gamma, &p.beta, &p.bias}) buffers.take(*v, A * p.c_out);
    for (void** v : {&p.running_mean, &p.running_var}) buffers.take(*v, A * p.c_out);
    buffers.take(p.act, 4 * p.c_out);
    buffers.take(p.measure, 1);
    buffers.take(p.out, T * p.rows / (p.pool_width ? 4 : 1) * p.c, true);
    buffers.take(p.gate, gst::bn_gate_bytes(p.type, p.rows, p.c), true);
    for (void** v : {&p.mean, &p.invstd}) buffers.take(*v, A * p.c, true);
    buffers.take(p.coefficients, A * 2 * p.c, true);
    buffers.take(p.partial, A * 2 * gst::bn_chunks(p.type, p.rows, p.c) * p.c, true);
    gst::launch_bn_act(p, nullptr);
  }
  return emulate::complaint.c_str();
}

EMULATED const char* emulated_bn_act_backward(gst::BnActBackward p) {
  emulate::complaint.clear();
  {
    emulate::Buffers buffers;
    const size_t T = emulate::map_bytes(p.type), A = emulate::parameter_bytes(p.type);
    buffers.take(p.live, 8 * p.c);
    buffers.take(p.grad, T * p.rows / (p.pool_width ? 4 : 1) * p.c);
    buffers.take(p.x, T * p.rows * p.c);
    buffers.take(p.gate, gst::bn_gate_bytes(p.type, p.rows, p.c));
    buffers.take(p.gamma, A * p.c_out);
    for (const void** v : {&p.mean, &p.invstd}) buffers.take(*v, A * p.c);
    buffers.take(p.residual_map, 8 * p.c);
    buffers.take(p.dx, T * p.rows * p.c, true);
    for (void** v : {&p.dgamma, &p.dbeta}) buffers.take(*v, A * p.c_out, true);
    buffers.take(p.dresidual, p.residual_width > 0 ? T * p.rows * p.residual_width : 0);
    buffers.take(p.coefficients, A * 3 * p.c, true);
    buffers.take(p.partial, A * 2 * gst::bn_chunks(p.type, p.rows, p.c) * p.c, true);
    gst::launch_bn_act_backward(p, nullptr);
  }
  return emulate::complaint.c_str();
}

EMULATED const char* emulated_ebn_score(const double* gamma, const double* beta, double* score, int64_t n,
                                        bool is_signed) {
  emulate::complaint.clear();
  {
    emulate::Buffers buffers;
    for (const double** v : {&gamma, &beta}) buffers.take(*v, 8 * n);
    buffers.take(score, 8 * n, true);
    gst::launch_ebn_score(gamma, beta, score, n, is_signed, nullptr);
  }
  return emulate::complaint.c_str();
}

EMULATED int64_t emulated_chunks(gst::Type type, int64_t rows, int64_t c) { return gst::bn_chunks(type, rows, c); }
EMULATED int64_t emulated_gate_bytes(gst::Type type, int64_t rows, int64_t c) {
  return gst::bn_gate_bytes(type, rows, c);
}
EMULATED void emulated_order(int order) { emulate::order = order; }
EMULATED int64_t emulated_count(int what) {
  return what == 0 ? emulate::launches : what == 1 ? emulate::barriers : emulate::shared_accesses;
}
