// Chooses the instruction set level once, at the first call.
#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cpc {
namespace {

Isa best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa available = best();
  const char* wanted = std::getenv("CPC_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return available;
  for (const Isa level : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    constexpr const char* names[] = {"baseline", "avx2", "avx512"};
    if (std::strcmp(wanted, names[static_cast<int>(level)]) == 0) return level < available ? level : available;
  }
  throw std::invalid_argument("CPC_EXT_ISA must be baseline, avx2 or avx512, got " + std::string(wanted));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: break;
  }
  return "baseline";
}

}  // namespace cpc
