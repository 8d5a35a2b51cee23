// Reads tensors through DLPack, see tensor_arg.h.
#include "bind/tensor_arg.h"

#include <algorithm>
#include <array>
#include <string>

namespace py = pybind11;

namespace cpc::bind {
namespace {

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The exchange table of a tensor type, or null. A handful of types (Tensor, Parameter) make all calls, so the last few
// results are cached. The cache holds a reference to each type, so that no other type can get its address.
const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type = nullptr;
    const DLPackExchangeAPI* api = nullptr;
  };
  static std::array<Entry, 8> known;
  static size_t next = 0;
  for (const Entry& entry : known)
    if (entry.type == type) return entry.api;

  const DLPackExchangeAPI* api = nullptr;
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!capsule.is_none()) {
    api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr)
      api = nullptr;
  }
  Py_INCREF(type);
  Py_XDECREF(known[next].type);
  known[next] = {type, api};
  next = (next + 1) % known.size();
  return api;
}

DType dtype_of(const DLDataType& type) {
  if (type.lanes == 1) {
    const int bits = type.bits;
    switch (type.code) {
      case kDLUInt:
        if (bits == 8) return DType::u8;
        break;
      case kDLBool:
        if (bits == 8) return DType::boolean;
        break;
      case kDLInt:
        if (bits == 32) return DType::i32;
        if (bits == 64) return DType::i64;
        break;
      case kDLFloat:
        if (bits == 16) return DType::f16;
        if (bits == 32) return DType::f32;
        if (bits == 64) return DType::f64;
        break;
      case kDLBfloat:
        if (bits == 16) return DType::bf16;
        break;
      default: break;
    }
  }
  throw py::type_error("a tensor has an element type that no kernel reads: DLPack code " + std::to_string(type.code) +
                       ", " + std::to_string(type.bits) + " bits, " + std::to_string(type.lanes) + " lanes");
}

// More than any memory holds, and few enough that products of such sizes with a kernel's factors fit into 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;
// No program or allocation lies below this address. A tensor whose storage was freed begins at its offset from address
// 0.
constexpr uintptr_t kLowestAddress = uintptr_t{4} << 20;

std::string list_of(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

void describe(TensorArg& arg, const DLTensor& tensor) {
  if (tensor.ndim > TensorView::kMaxDims)
    throw py::type_error("a tensor has " + std::to_string(tensor.ndim) + " dimensions, at most " +
                         std::to_string(TensorView::kMaxDims) + " are supported");
  arg.device = tensor.device;
  TensorView& view = arg.view;
  view.dtype = dtype_of(tensor.dtype);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  int64_t dense = 1;              // The stride of a dense tensor; producers may leave strides out.
  int64_t before = 0, after = 0;  // Elements that lie before and after the first.
  bool empty = false, fits = true;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    const int64_t size = tensor.shape[d], stride = tensor.strides != nullptr ? tensor.strides[d] : dense;
    view.shape[d] = size;
    view.strides[d] = stride;
    if (size <= 0) {
      empty = true;
      fits &= size == 0;
      continue;
    }
    int64_t reach;
    fits &= !__builtin_mul_overflow(size - 1, stride, &reach) && !__builtin_mul_overflow(dense, size, &dense) &&
            dense <= kMostElements;
    if (!fits) break;
    (reach < 0 ? before : after) += std::clamp(reach, -kMostElements, kMostElements);
  }
  if (!fits || before <= -kMostElements || after >= kMostElements)
    throw py::value_error("a tensor of sizes " + list_of(tensor.shape, tensor.ndim) +
                          (tensor.strides ? " and strides " + list_of(tensor.strides, tensor.ndim) : "") +
                          " reaches further than memory does");
  if (empty) return;
  const auto first = reinterpret_cast<uintptr_t>(view.data), size = static_cast<uintptr_t>(size_of(view.dtype));
  if (first < kLowestAddress)
    throw py::type_error("a tensor of sizes " + list_of(tensor.shape, tensor.ndim) +
                         " has no memory: its storage was freed");
  arg.begin = first + static_cast<uintptr_t>(before) * size;
  arg.end = first + static_cast<uintptr_t>(after + 1) * size;
}

// Calls __dlpack__ in its current form, or, of older producers, in its first.
py::object dlpack_capsule(py::handle object) {
  const py::object method = object.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return method();
  }
}

}  // namespace

TensorArg tensor_from(py::handle object) {
  TensorArg arg;
  arg.object = object;
  arg.api = exchange_api(Py_TYPE(object.ptr()));
  if (arg.api != nullptr) {
    DLTensor tensor;
    if (arg.api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) throw py::error_already_set();
    describe(arg, tensor);
    return arg;
  }
  if (!py::hasattr(object, "__dlpack__")) throw py::type_error("expected a tensor, got " + type_name(object));
  arg.owner = dlpack_capsule(object);
  if (PyCapsule_IsValid(arg.owner.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(arg.owner.ptr(), "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION)
      throw py::type_error(type_name(object) + " speaks DLPack " + std::to_string(managed->version.major) +
                           ", this build " + std::to_string(DLPACK_MAJOR_VERSION));
    arg.readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    describe(arg, managed->dl_tensor);
  } else {
    const auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(arg.owner.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    describe(arg, managed->dl_tensor);
  }
  return arg;
}

void* current_stream(const TensorArg& tensor) {
  if (tensor.api == nullptr) return nullptr;  // The default stream: such a producer has no other.
  void* stream = nullptr;
  if (tensor.api->current_work_stream(tensor.device.device_type, tensor.device.device_id, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace cpc::bind
