// How the blocks of a launch depend on each other, and how later launches depend on them.
#pragma once

#include <cstdint>

namespace cpc::cuda {

enum class Blocks : uint8_t {
  apart,     // They do not.
  whole,     // Results are addresses that later launches access, so an emulation of a sample of blocks must run all.
  together,  // All blocks run at the same time and wait for each other, see block_barrier.cuh.
};

}  // namespace cpc::cuda
