// Converts the values in its input with SoftHalf of csrc/core/half.h: "float" or "double" to half, "half" to float.
#include <cstdio>
#include <cstring>

#include "core/half.h"

namespace {

template <class From, class To, class Convert>
void convert_all(const Convert& convert) {
  From from;
  while (std::fread(&from, sizeof from, 1, stdin) == 1) {
    const To to = convert(from);
    std::fwrite(&to, sizeof to, 1, stdout);
  }
}

template <class From>
uint16_t to_half(From v) {
  return std::bit_cast<uint16_t>(cpc::SoftHalf(v));
}

}  // namespace

int main(int, char** arguments) {
  if (std::strcmp(arguments[1], "float") == 0) convert_all<float, uint16_t>(to_half<float>);
  if (std::strcmp(arguments[1], "double") == 0) convert_all<double, uint16_t>(to_half<double>);
  if (std::strcmp(arguments[1], "half") == 0)
    convert_all<uint16_t, float>([](uint16_t v) { return static_cast<float>(std::bit_cast<cpc::SoftHalf>(v)); });
}
