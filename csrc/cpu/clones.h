// How plain loops get the vectors of the CPU they run on. An extension is compiled for the oldest
// CPU of its kind, and at::vec with it, so a function with GST_CLONES is compiled several times,
// and the loader chooses one. Whatever it calls has to be compiled into it: functions are GST_BODY,
// lambdas GST_INLINE.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define GST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GST_HAS_CLONES 1
#else
#define GST_CLONES
#define GST_HAS_CLONES 0
#endif
#define GST_INLINE __attribute__((always_inline))
#define GST_BODY static inline GST_INLINE

namespace gst {

// Whether this CPU has AVX-512.
inline bool has_wide_vectors() {
#if GST_HAS_CLONES
  static const bool found = __builtin_cpu_supports("x86-64-v4");
  return found;
#else
  return false;
#endif
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace gst
