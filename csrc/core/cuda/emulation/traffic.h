// Counts the memory traffic of a kernel on a GPU: sectors of device memory, wavefronts of shared memory, and the
// instructions of each kind that the warps issue.
//
// The n-th access of each lane at a place is one request of its warp, as if the lanes went through loops in step.
// Requests to device memory are served in sectors of 32 bytes, those to shared memory in wavefronts: each of the 32
// banks gives one word of 4 bytes at a time; accesses of 8 bytes per lane are served by half warps, those of 16 by
// quarter warps. Caches are not simulated. The distinct sectors of each block, and of the launch, are counted beside
// the requested ones, which shows what a cache of that scope would leave.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/cuda/emulation/trace.h"

namespace cpc::cuda::emulation {

class Traffic : public Observer {
 public:
  void launch_begins(const Launch& launch, const Sample& sample) override;
  void block_begins(uint64_t block) override;
  void access(const Access& access) override;
  void barrier(Place) override { launches_.back().barriers += warps(); }
  void collective(const CollectiveEvent& event) override;
  void load_matrices(const MatrixLoad& load) override;
  void multiply_add(const MultiplyAdd& product) override;
  void arithmetic(Arithmetic what) override { ++launches_.back().arithmetic[static_cast<size_t>(what)]; }
  void copy_async(const CopyAsync& copy) override;
  void block_ends() override;
  Value results() override;

 private:
  // The kind of access to memory.
  enum class Way : uint8_t { read, write, atomic, copied_from, copied_to, matrix };
  struct Key {
    Place place;
    Way way;
    Space space;
    bool operator==(const Key&) const = default;
  };
  struct HashOfKey {
    size_t operator()(const Key& key) const {
      return key.place * size_t{16} + static_cast<size_t>(key.way) * 2 + static_cast<size_t>(key.space);
    }
  };
  // The accesses that the lanes of a warp make at once. A lane with 0 bytes does not take part.
  struct Request {
    std::array<uintptr_t, kWarp> address;
    std::array<uint16_t, kWarp> bytes{};
    unsigned lanes = 0;
  };
  // Requests of a warp at a place, from number `first` on, that not all lanes have made yet.
  struct Pending {
    std::deque<Request> requests;
    uint64_t first = 0;
    std::array<uint64_t, kWarp> times{};  // The accesses of each lane so far.
  };
  // Units are sectors of device memory, or wavefronts of shared memory. `ideal` is the least number of units for the
  // bytes.
  struct Count {
    uint64_t requests = 0, lanes = 0, bytes = 0, units = 0, ideal = 0;
  };
  struct At {
    std::vector<Pending> warps;
    Count count;
  };
  struct Counted {
    std::string kernel;
    const void* function;
    uint64_t grid, blocks_run, block_sectors_read = 0, block_sectors_written = 0;
    unsigned block;
    size_t shared_bytes;
    std::unordered_map<Key, At, HashOfKey> at;
    std::map<std::string, uint64_t> products;
    std::array<uint64_t, 3> arithmetic{};
    uint64_t shuffles = 0, votes = 0, warp_barriers = 0, barriers = 0;
    std::map<size_t, uint64_t> copies;
    std::unordered_set<uintptr_t> read, written;  // Sectors.
  };

  unsigned warps() const { return (launches_.back().block + kWarp - 1) / kWarp; }
  void ask(const Key& key, unsigned thread, uintptr_t address, size_t bytes);
  void serve(const Key& key, Count& count, const Request& request);
  Dict results_of(const Counted& launch, const std::map<Place, std::string>& places) const;

  std::vector<Counted> launches_;
  std::unordered_set<uintptr_t> block_read_, block_written_;
};

}  // namespace cpc::cuda::emulation
