// Chooses the instruction set level once, at the first call.
#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cpc {
namespace {

// By level.
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best() {
#if defined(__x86_64__) && !defined(CPC_ONE_ISA)
  // Everything that the compiler may use at these levels, x86-64-v3 and v4, is checked: a virtual machine may lack a
  // part.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") ||
      !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("lzcnt") ||
      !__builtin_cpu_supports("movbe"))
    return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa available = best();
  const char* wanted = std::getenv("CPC_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return available;
  std::string names;
  for (const Isa level : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    const char* name = kNames[static_cast<int>(level)];
    if (std::strcmp(wanted, name) == 0) return level < available ? level : available;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument("CPC_EXT_ISA must be one of " + names + ", got " + wanted);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  const char* name = kNames[static_cast<int>(isa())];
#ifdef CPC_ONE_ISA
  name = "native";
#endif
  return name;
}

}  // namespace cpc
