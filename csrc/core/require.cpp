// See require.h.
#include "core/require.h"

#include <algorithm>

namespace cpc {

void require_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  TensorView wanted;
  wanted.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), wanted.shape);
  require(view.ndim == wanted.ndim && std::equal(shape.begin(), shape.end(), view.shape),
          std::string(name) + " must be " + shape_of(wanted) + ", got " + shape_of(view));
}

bool is_dense(const TensorView& view, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto d = std::rbegin(order); d != std::rend(order); ++d) {
    if (view.shape[*d] != 1 && view.strides[*d] != expected) return false;
    expected *= view.shape[*d];
  }
  return true;
}

}  // namespace cpc
