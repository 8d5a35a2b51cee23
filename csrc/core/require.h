// Checks of a problem against its contract, one line per requirement. Errors name the argument, what was expected and
// what came.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/tensor_view.h"

namespace cpc {

inline std::string shape_of(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.shape[d]);
  return text + "]";
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void require_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> shape);

// True if the view is dense with its dimensions in the given order, outermost first. Strides of dimensions of size 1
// are ignored.
bool is_dense(const TensorView& view, std::initializer_list<int> order);

}  // namespace cpc
