// Prints the results of the emulation's observers (core/cuda/emulation/trace.h) as JSON.
#pragma once

#include <cstdio>

#include "core/cuda/emulation/trace.h"

namespace cpc::cuda {

inline void print(const emulation::Value& value) {
  const char* separator = "";
  if (const auto* list = std::get_if<emulation::List>(&value)) {
    std::printf("[");
    for (const auto& item : *list) std::printf("%s", separator), print(item), separator = ",";
    std::printf("]");
  } else if (const auto* dict = std::get_if<emulation::Dict>(&value)) {
    std::printf("{");
    for (const auto& [key, item] : *dict)
      std::printf("%s\"%s\":", separator, key.c_str()), print(item), separator = ",";
    std::printf("}");
  } else if (const auto* number = std::get_if<int64_t>(&value)) {
    std::printf("%lld", static_cast<long long>(*number));
  } else {
    std::printf("\"%s\"", std::get<std::string>(value).c_str());
  }
}

}  // namespace cpc::cuda
