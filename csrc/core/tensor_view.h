// A typed, strided view of memory that somebody else owns: everything that a kernel knows about a tensor.
// It is plain data, so that it can be passed to a CUDA kernel by value.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define CPC_HOST_DEVICE __host__ __device__
#else
#define CPC_HOST_DEVICE
#endif

namespace cpc {

enum class DType : uint8_t { u8, boolean, i32, i64, f16, bf16, f32, f64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::boolean: return 1;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::i32:
    case DType::f32: return 4;
    case DType::i64:
    case DType::f64: return 8;
  }
  return 0;
}

constexpr bool is_floating(DType dtype) { return dtype >= DType::f16; }

// Storage of the 16-bit floating types. Kernels compute in float or double and convert when they load and store.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct TensorView {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;  // First element; null where the tensor is absent or empty.
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // In elements.

  template <class T>
  CPC_HOST_DEVICE T* as() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int d = 0; d < ndim; ++d) product *= shape[d];
    return product;
  }
};

// Calls work with a value of the floating type that `dtype` names.
template <class Work>
void with_floating(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::f16: return work(Half{});
    case DType::bf16: return work(BFloat16{});
    case DType::f32: return work(float{});
    default: return work(double{});
  }
}

}  // namespace cpc
