// The instruction set levels that the CPU kernels are compiled for, and the choice between them. CMake compiles every
// OP/cpu.cpp once per level with CPC_ISA set to the level's name, which is also the namespace that keeps the copies
// apart. At the last level it compiles only the sources that use bfloat16 products, and of these only the kernels of
// that type: all others would be the same as one level below. With CPC_ONE_ISA there is only the level named baseline,
// whatever it is compiled for.
#pragma once

#include "core/tensor_view.h"

namespace cpc {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best level this processor has; the environment variable CPC_EXT_ISA=NAME lowers it.
Isa isa();
// The best level that has kernels of this type.
inline Isa isa_of(DType dtype) { return isa() == Isa::avx512_bf16 && dtype != DType::bf16 ? Isa::avx512 : isa(); }
// The name of the level in use, or "native" with CPC_ONE_ISA.
const char* isa_name();

// These macros declare a kernel at each level and call it at this processor's level. A kernel without bfloat16 products
// is declared with CPC_DECLARE_WITHOUT_BFLOAT16; one with them is called with CPC_CALL_AT_ISA_OF, which takes the dtype
// of the tensors. They are macros because the same declaration goes into several namespaces.
#if defined(__x86_64__) && !defined(CPC_ONE_ISA)
#define CPC_DECLARE_AT_EACH_ISA(...)    \
  CPC_DECLARE_UP_TO_AVX512(__VA_ARGS__) \
  namespace avx512_bf16 {               \
  __VA_ARGS__;                          \
  }
#define CPC_DECLARE_WITHOUT_BFLOAT16(...) \
  CPC_DECLARE_UP_TO_AVX512(__VA_ARGS__)   \
  namespace avx512_bf16 = avx512;
#define CPC_DECLARE_UP_TO_AVX512(...) \
  namespace baseline {                \
  __VA_ARGS__;                        \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__;                        \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__;                        \
  }
#define CPC_CALL_AT_ISA(function, ...) CPC_CALL_AT(::cpc::isa(), function, __VA_ARGS__)
#define CPC_CALL_AT_ISA_OF(dtype, function, ...) CPC_CALL_AT(::cpc::isa_of(dtype), function, __VA_ARGS__)
#define CPC_CALL_AT(level, function, ...)                                    \
  switch (level) {                                                           \
    case ::cpc::Isa::avx512_bf16: return avx512_bf16::function(__VA_ARGS__); \
    case ::cpc::Isa::avx512: return avx512::function(__VA_ARGS__);           \
    case ::cpc::Isa::avx2: return avx2::function(__VA_ARGS__);               \
    case ::cpc::Isa::baseline: return baseline::function(__VA_ARGS__);       \
  }                                                                          \
  __builtin_unreachable();
#else
#define CPC_DECLARE_AT_EACH_ISA(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }
#define CPC_DECLARE_WITHOUT_BFLOAT16 CPC_DECLARE_AT_EACH_ISA
#define CPC_CALL_AT_ISA(function, ...) return baseline::function(__VA_ARGS__);
#define CPC_CALL_AT_ISA_OF(dtype, function, ...) CPC_CALL_AT_ISA(function, __VA_ARGS__)
#endif

}  // namespace cpc
