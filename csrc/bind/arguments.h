// Checks of the tensors of a call: they are on one device, and the kernel may write to its outputs' memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <span>

#include "bind/tensor_arg.h"

namespace cpc::bind {

using OptionalTensor = std::optional<TensorArg>;
inline TensorView view(const OptionalTensor& tensor) { return tensor ? tensor->view : TensorView{}; }

// A tensor with the name of its argument. The tensor is null where it is absent.
struct Argument {
  Argument() = default;
  Argument(const char* name, const TensorArg& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const OptionalTensor& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}

  const char* name = nullptr;
  const TensorArg* tensor = nullptr;
};

// Returns the device that all tensors are on. Throws std::invalid_argument where they are on several, or where a
// written tensor is read-only or shares memory with itself or another argument. Tensors that are only read may share
// memory.
DLDevice common_device(std::span<const Argument> read, std::span<const Argument> written);
inline DLDevice common_device(std::initializer_list<Argument> read, std::initializer_list<Argument> written) {
  return common_device(std::span(read.begin(), read.size()), std::span(written.begin(), written.size()));
}

}  // namespace cpc::bind
