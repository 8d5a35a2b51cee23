// Checks the tensors of a call against one another, see arguments.h. Every call pays for this, so the usual case is
// tested first: the ranges of memory do not meet.
#include "bind/arguments.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace cpc::bind {
namespace {

// True if every dimension steps over the range of all dimensions with smaller strides, so that no two elements share
// memory. This holds for slices and permutations of dense tensors.
bool nests(const TensorView& view) {
  struct Dimension {
    int64_t stride, reach;
  };
  Dimension sorted[TensorView::kMaxDims];
  int count = 0;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] == 1) continue;
    const int64_t stride = std::abs(view.strides[d]);
    int at = count++;
    for (; at > 0 && sorted[at - 1].stride > stride; --at) sorted[at] = sorted[at - 1];
    sorted[at] = {stride, (view.shape[d] - 1) * stride};
  }
  int64_t reached = 0;
  for (int i = 0; i < count; ++i) {
    if (sorted[i].stride <= reached) return false;
    reached += sorted[i].reach;
  }
  return true;
}

// Bytes from the first to the last element, leaving out the dimensions whose steps are multiples of the period.
uintptr_t width_within(const TensorView& view, int64_t period) {
  int64_t width = size_of(view.dtype);
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t step = std::abs(view.strides[d]) * size_of(view.dtype);
    if (step % period != 0) width += (view.shape[d] - 1) * step;
  }
  return width;
}

// True if two tensors whose ranges of memory meet still share none: so do columns or channels of one tensor, where each
// has its own part of every row or pixel. The period of that pattern is one of the steps of either tensor.
bool interleave(const TensorArg& a, const TensorArg& b) {
  for (const TensorArg* arg : {&a, &b})
    for (int d = 0; d < arg->view.ndim; ++d) {
      const int64_t period = std::abs(arg->view.strides[d]) * size_of(arg->view.dtype);
      if (period == 0 || arg->view.shape[d] == 1) continue;
      const auto modulus = static_cast<uintptr_t>(period);
      const uintptr_t ahead = (b.begin % modulus + modulus - a.begin % modulus) % modulus;
      if (width_within(a.view, period) <= ahead && ahead + width_within(b.view, period) <= modulus) return true;
    }
  return false;
}

void require_apart(const Argument& written, const Argument& other) {
  const TensorArg &a = *written.tensor, &b = *other.tensor;
  if (a.end <= b.begin || b.end <= a.begin || interleave(a, b)) return;
  throw std::invalid_argument(std::string(written.name) + " must not share memory with " + other.name);
}

}  // namespace

DLDevice common_device(std::span<const Argument> read, std::span<const Argument> written) {
  const TensorArg* first = nullptr;
  for (const auto& list : {read, written})
    for (const Argument& argument : list) {
      if (argument.tensor == nullptr) continue;
      if (first == nullptr) first = argument.tensor;
      const DLDevice device = argument.tensor->device;
      if (device.device_type != first->device.device_type || device.device_id != first->device.device_id)
        throw std::invalid_argument("all tensors must be on one device");
    }
  for (const Argument& output : written) {
    if (output.tensor == nullptr) continue;
    if (output.tensor->readonly)
      throw std::invalid_argument(std::string("the output ") + output.name + " is read-only");
    if (output.tensor->begin == output.tensor->end) continue;
    if (!nests(output.tensor->view))
      throw std::invalid_argument(std::string(output.name) +
                                  " must not share memory with itself, as it does where it is expanded");
    for (const Argument& input : read)
      if (input.tensor != nullptr) require_apart(output, input);
    for (const Argument* other = &output + 1; other != written.data() + written.size(); ++other)
      if (other->tensor != nullptr) require_apart(output, *other);
  }
  return first->device;
}

}  // namespace cpc::bind
