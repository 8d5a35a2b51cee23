// How the blocks of a launch depend on each other, and later launches on them.
#pragma once

#include <cstdint>

namespace cpc::cuda {

enum class Blocks : uint8_t {
  apart,     // Not at all.
  whole,     // Later launches access memory where this one says: an emulation of some of its blocks runs all.
  together,  // All run at the same time and wait for each other: block_barrier.cuh.
};

}  // namespace cpc::cuda
