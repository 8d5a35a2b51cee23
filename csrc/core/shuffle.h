// Exchanges between the lanes of registers. Compilers have two builtins for them: that of Clang and of GCC from 12 on
// takes the lanes as constants, that of older GCCs takes a vector of them.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <utility>

#include "core/gemm.h"

namespace cpc::CPC_ISA {

// Lane i of the result is lane place(i) of `a` followed by `b`. `place` is a constant expression.
template <auto place, class S, int... lane>
[[gnu::always_inline]] inline Register<S> shuffle(Register<S> a, Register<S> b, std::integer_sequence<int, lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, place(lane)...);
#else
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  typedef Int Places __attribute__((vector_size(kRegisterBytes)));
  return __builtin_shuffle(a, b, Places{place(lane)...});
#endif
}
template <auto place, class S>
[[gnu::always_inline]] inline Register<S> shuffle(Register<S> a, Register<S> b) {
  return shuffle<place, S>(a, b, std::make_integer_sequence<int, kRegisterLanes<S>>{});
}

// Transposes: lane i of row j becomes lane j of row i. Blocks of `step` rows and lanes are exchanged with their
// neighbours, then the blocks within them.
template <class S, int step = kRegisterLanes<S> / 2>
[[gnu::always_inline]] inline void transpose(Register<S> (&rows)[kRegisterLanes<S>]) {
  constexpr int kLanes = kRegisterLanes<S>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Register<S> first = rows[i], second = rows[i + step];
    rows[i] = shuffle<[](int lane) { return lane & step ? kLanes + lane - step : lane; }, S>(first, second);
    rows[i + step] = shuffle<[](int lane) { return lane & step ? kLanes + lane : lane + step; }, S>(first, second);
  }
  if constexpr (step > 1) transpose<S, step / 2>(rows);
}

// Reduces the lanes of a register with `combine`, as a tree.
template <class S, int step = kRegisterLanes<S> / 2, class Combine>
[[gnu::always_inline]] inline S across_lanes(Register<S> v, const Combine& combine) {
  v = combine(v, shuffle<[](int lane) { return lane ^ step; }, S>(v, v));
  if constexpr (step > 1)
    return across_lanes<S, step / 2>(v, combine);
  else
    return v[0];
}

}  // namespace cpc::CPC_ISA
