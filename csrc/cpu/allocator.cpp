// An allocator for tensors on the CPU under which a freed tensor's memory holds the next tensor of
// its size. PyTorch's own asks glibc for aligned memory, which glibc cuts out of a larger piece
// than it keeps, so that the next one of the same size does not fit there.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>

namespace gst {
namespace {

constexpr size_t kAlignment = c10::gAlignment;

struct ReusingAllocator final : c10::Allocator {
  // The address that malloc gave is just before the tensor.
  static void free(void* data) {
    if (data) std::free(static_cast<void**>(data)[-1]);
  }

  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t extra = kAlignment + sizeof(void*);
    void *given = nullptr, *data = nullptr;
    if (bytes > 0) {
      given = std::malloc(bytes + extra);
      TORCH_CHECK(given, "not enough memory: a tensor of ", bytes, " bytes does not fit");
      const auto address = reinterpret_cast<uintptr_t>(given) + extra;
      data = reinterpret_cast<void*>(address - address % kAlignment);
      static_cast<void**>(data)[-1] = given;
    }
    return {data, data, &free, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// For all tensors from now on.
void reuse_freed_memory() {
  static ReusingAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gst, m) { m.def("reuse_freed_memory", reuse_freed_memory); }

}  // namespace gst
