// The tensors of a call: on one device, and in memory that the kernel may write where it writes.
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

// A tensor by the name of its argument; absent where it is null.
struct Argument {
  Argument() = default;
  Argument(const char* name, const TensorArg& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const OptionalTensor& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}

  const char* name = nullptr;
  const TensorArg* tensor = nullptr;
};

// The device that all of them are on. Throws std::invalid_argument where there are several, or where what is written
// is read-only or shares memory with itself or another argument. What is read may be one tensor twice.
DLDevice common_device(std::span<const Argument> read, std::span<const Argument> written);
inline DLDevice common_device(std::initializer_list<Argument> read, std::initializer_list<Argument> written) {
  return common_device(std::span(read.begin(), read.size()), std::span(written.begin(), written.size()));
}

}  // namespace cpc::bind
