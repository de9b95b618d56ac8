// Convolutions in bf16 as the library's matrix products, which are several times as fast as its
// convolutions where maps are small: pixels of which the filters reach the same taps are one
// product, so that taps outside the map are not multiplied. A product rounds once, as a convolution
// does.
#include "products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/flip.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "clones.h"

namespace gst {
namespace {

using at::Tensor;

struct Span {  // results of a row or column, and the taps of the filters that are inside the map
  int64_t begin, end, tap, taps;
};

std::vector<Span> spans(
    int64_t inputs, int64_t results, int64_t kernel, int64_t stride, int64_t padding) {
  std::vector<Span> all;
  for (int64_t i = 0; i < results; ++i) {
    const int64_t first = i * stride - padding, tap = std::max<int64_t>(0, -first),
                  taps = std::max<int64_t>(0, std::min(kernel, inputs - first) - tap);
    if (!all.empty() && all.back().tap == tap && all.back().taps == taps) all.back().end = i + 1;
    else all.push_back({i, i + 1, tap, taps});
  }
  return all;
}

// The results whose filters' tap is inside the map.
Span results_of_tap(
    int64_t tap, int64_t inputs, int64_t results, int64_t stride, int64_t padding) {
  int64_t begin = 0, end = results;
  while (begin < end && begin * stride - padding + tap < 0) ++begin;
  while (end > begin && (end - 1) * stride - padding + tap >= inputs) --end;
  return {begin, end, tap, 1};
}

Tensor pixels_first(const Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); }

}  // namespace

// Measured with 32 and 128 images: elsewhere the library's convolutions are as fast or faster.
// Without AVX-512 its products in bf16 are slow.
bool products_pay(
    const Tensor& x, const Tensor& weight, at::IntArrayRef size, bool weight_gradient) {
  const int64_t most = std::max(size[0], size[1]),
                channels = std::min(weight.size(0), weight.size(1));
  const bool pays = channels >= 64 &&
      (weight_gradient ? most <= 8 : most <= 2 || (most <= 4 && channels >= 256));
  return pays && has_wide_vectors() && x.is_cpu() && x.scalar_type() == at::kBFloat16 &&
      weight.size(2) > 1 && weight.size(3) > 1 && x.size(0) >= 32;
}

Tensor convolve_by_products(
    const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, bool flipped) {
  const int64_t kh = weight.size(2), kw = weight.size(3), c_in = x.size(1),
                c_out = weight.size(flipped ? 1 : 0), n = x.size(0), h = x.size(2), w = x.size(3);
  const int64_t top = flipped ? kh - 1 - padding : padding,
                left = flipped ? kw - 1 - padding : padding;
  const Tensor map = pixels_first(x), given = pixels_first(weight);
  const Tensor filters = flipped ? given.permute({1, 2, 0, 3}).flip({0, 1}) : given;
  const int64_t out_h = (h + 2 * top - kh) / stride + 1, out_w = (w + 2 * left - kw) / stride + 1;
  const Tensor out = at::empty({n, out_h, out_w, c_out}, x.options());
  for (const Span& r : spans(h, out_h, kh, stride, top))
    for (const Span& c : spans(w, out_w, kw, stride, left)) {
      const int64_t rows = r.end - r.begin, columns = c.end - c.begin;
      const Tensor to = out.slice(1, r.begin, r.end).slice(2, c.begin, c.end);
      if (r.taps == 0 || c.taps == 0) {
        to.zero_();
        continue;
      }
      const int64_t y = r.begin * stride - top + r.tap, z = c.begin * stride - left + c.tap;
      const Tensor read =
          map.as_strided({n, rows, columns, r.taps, c.taps * c_in},
                 {h * w * c_in, stride * w * c_in, stride * c_in, w * c_in, 1},
                 map.storage_offset() + (y * w + z) * c_in)
              .reshape({n * rows * columns, r.taps * c.taps * c_in});
      const int64_t dim = flipped ? 0 : 1;
      const Tensor taps =
          filters.slice(dim, r.tap, r.tap + r.taps).slice(dim + 1, c.tap, c.tap + c.taps);
      to.copy_(
          at::mm(read, flipped ? taps.reshape({-1, c_out}) : taps.reshape({c_out, -1}).t())
              .view({n, rows, columns, c_out}));
    }
  return out.permute({0, 3, 1, 2});
}

Tensor weight_gradient_by_products(const Tensor& grad, const Tensor& x, const Tensor& weight,
    int64_t stride, int64_t padding) {
  const int64_t c_out = grad.size(1), c_in = x.size(1);
  const Tensor map = pixels_first(x), above = pixels_first(grad);
  const Tensor dw = at::zeros({weight.size(2), weight.size(3), c_out, c_in}, x.options());
  for (int64_t i = 0; i < weight.size(2); ++i)
    for (int64_t j = 0; j < weight.size(3); ++j) {
      const Span r = results_of_tap(i, x.size(2), grad.size(2), stride, padding),
                 c = results_of_tap(j, x.size(3), grad.size(3), stride, padding);
      if (r.begin == r.end || c.begin == c.end) continue;
      const auto read = [&](const Tensor& t, int64_t dim, const Span& s) {
        const int64_t first = s.begin * stride - padding + s.tap;
        return t.slice(dim, first, first + (s.end - s.begin - 1) * stride + 1, stride);
      };
      Tensor to = dw.select(0, i).select(0, j);
      at::mm_out(to,
          above.slice(1, r.begin, r.end).slice(2, c.begin, c.end).reshape({-1, c_out}).t(),
          read(read(map, 1, r), 2, c).reshape({-1, c_in}));
    }
  return dw.permute({2, 3, 0, 1}).contiguous(weight.suggest_memory_format());
}

}  // namespace gst
