// A pybind11 argument type that reads tensors through DLPack, without linking their framework.
// PyTorch 2.11 and newer publish a table of C functions on the tensor type, which costs a few instructions a tensor.
// For other producers, NumPy among them, __dlpack__ is called and its capsule kept alive for the call.
#pragma once

#include <pybind11/pybind11.h>

#include "core/tensor_view.h"
#include "third_party/dlpack/dlpack.h"

namespace cpc::bind {

struct TensorArg {
  TensorView view;
  DLDevice device{kDLCPU, 0};
  // The address of the lowest element and the one past the highest; both 0 where the tensor is empty.
  uintptr_t begin = 0, end = 0;
  bool readonly = false;
  pybind11::handle object;                 // A borrowed reference: the caller keeps the object alive.
  const DLPackExchangeAPI* api = nullptr;  // Null for producers without the table.
  pybind11::object owner;                  // The capsule of such a producer.
};

// Throws TypeError for an object that is no tensor or a tensor that no kernel can read, and ValueError for one whose
// sizes or strides reach further than memory does, so that products of a tensor's sizes cannot overflow.
TensorArg tensor_from(pybind11::handle object);

// The CUDA stream that the tensor's framework is working on, for the tensor's device.
void* current_stream(const TensorArg& tensor);

}  // namespace cpc::bind

template <>
struct pybind11::detail::type_caster<cpc::bind::TensorArg> {
  PYBIND11_TYPE_CASTER(cpc::bind::TensorArg, const_name("Tensor"));
  bool load(handle source, bool) {
    value = cpc::bind::tensor_from(source);
    return true;
  }
};
