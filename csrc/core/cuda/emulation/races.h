// Finds races: two accesses to a byte by different threads, at least one of them a write, that nothing orders.
//
// Accesses are ordered by the program, for one thread; by __syncthreads, for all threads of a block; by __syncwarp, for
// the lanes of its mask; and by the end of a launch, for all. Shuffles, votes, ldmatrix and mma do not order memory,
// although lanes wait for each other there. An asynchronous copy writes its destination and reads its source at any
// time between its start and the end of its thread's wait for it; after that it counts as an access of that thread.
// Atomic operations race with plain accesses but not with each other, and order nothing. Only a barrier among blocks
// orders two blocks. A race is an error even if both threads write the same value.
//
// The detector follows the accesses of one run, but its verdict holds for all orders in which the threads could have
// run: it looks for what orders two accesses, not for which came first. Because only collective operations order
// threads, a thread's vector clock reduces to the number of barriers before and the clocks of its warp's lanes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "core/cuda/emulation/trace.h"

namespace cpc::cuda::emulation {

class Races : public Observer {
 public:
  // The kind of an access, and the access itself as one party of a race.
  enum class Kind : uint8_t { read, write, atomic, copied_from, copied_to };
  struct Party {
    Kind kind;
    uint64_t block;
    unsigned thread;
    Place place;
    uint32_t turn;  // The turn of its block, which is one more after each barrier among blocks that run together.
  };
  struct Race {
    std::string kernel;
    Party first, second;
    Space space;
    std::string where;  // The first byte at which it was found.
    uint64_t times = 1;
  };

  // With `collect`, races are only collected; otherwise they are an error of the launch.
  explicit Races(bool collect) : collect_(collect) {}

  void launch_begins(const Launch& launch, const Sample&) override;
  void block_begins(uint64_t block) override;
  void access(const Access& access) override;
  void barrier(Place) override { ++epoch_; }
  void collective(const CollectiveEvent& event) override;
  void load_matrices(const MatrixLoad& load) override;
  void copy_async(const CopyAsync& copy) override;
  void commit_copies(unsigned thread) override { thread_state(thread).groups.emplace_back(); }
  void wait_for_copies(unsigned thread, size_t pending_groups, Place) override;
  void blocks_meet(const std::vector<uint64_t>& blocks) override;
  void launch_ends() override;
  // {"launches": {kernel: number}, "races": [...]}
  Value results() override;

 private:
  // An access of this block. `copy` is the number of a pending asynchronous copy, or 0.
  struct Stamp {
    Place place = 0;
    unsigned thread = 0;
    uint32_t epoch = 0, clock = 0;
    uint32_t copy = 0;
  };
  // The accesses to a run of bytes since the last write that came after all accesses before it.
  struct Cell {
    uint64_t block_number = 0, block = 0;  // The former counts blocks over all launches. The rest is of this block.
    uint32_t turn = 0;
    bool written = false;
    Stamp write;
    std::vector<Stamp> reads, atomics, copied_from;
    // One access of each kind by an earlier block of the launch, which is enough because all later accesses are by
    // other blocks. Where blocks run together, the latest access of each kind by each block.
    std::vector<Party> earlier;
  };
  // 16 bytes, cut into cells where accesses begin and end.
  struct Line {
    uint32_t cuts = 1;
    std::vector<Cell> cells{1};
  };
  static constexpr size_t kLine = 16, kLinesOfPage = 256;
  struct Page {
    Line lines[kLinesOfPage];
  };
  struct Shadow {
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    uintptr_t last_number = 0;
    Page* last = nullptr;

    Line& line(uintptr_t address);
    void clear();
  };
  struct Copy {
    uint32_t number;
    CopyAsync copy;
  };
  struct ThreadState {
    uint32_t clocks[kWarp];                 // The last known clocks of the warp's lanes, its own among them.
    std::vector<std::vector<Copy>> groups;  // The last is open.
  };

  ThreadState& thread_state(unsigned thread);
  Shadow& shadow(Space space) { return space == Space::shared ? shared_ : global_; }
  Stamp now(unsigned thread, Place place, uint32_t copy = 0);
  bool ordered(const Stamp& before, const Stamp& now);
  template <class Visit>
  void for_cells(Space space, const void* address, size_t bytes, const Visit& visit);
  void touch(Space space, const void* address, size_t bytes, Kind kind, const Stamp& stamp);
  void touch_cell(Cell& cell, Space space, uintptr_t address, Kind kind, const Stamp& stamp);
  void begin_block(Cell& cell, Space space) const;
  void add(std::vector<Stamp>& to, const Stamp& stamp);
  void finish(const Copy& copy);
  Party party(Kind kind, const Stamp& stamp) const { return {kind, block_, stamp.thread, stamp.place, turn_}; }
  // Whether an earlier block's access is ordered before everything that the current block does now.
  bool ordered(const Party& before) const;
  void found(Space space, uintptr_t address, const Party& first, const Party& second);

  const bool collect_;
  std::string kernel_;
  std::map<std::string, int64_t> launches_;
  uint64_t block_ = 0, block_number_ = 0;
  // For blocks that run together: the current block's turn, the turn of each block, and for each block the last turn of
  // the other blocks that is ordered before it.
  bool together_ = false;
  uint32_t turn_ = 0;
  std::map<uint64_t, uint32_t> turns_;
  std::map<uint64_t, std::map<uint64_t, uint32_t>> after_;
  uint32_t epoch_ = 0, copies_ = 0;
  std::vector<ThreadState> threads_;
  Shadow shared_, global_;
  std::vector<Race> races_;
  std::map<std::tuple<std::string, Kind, Place, Kind, Place, bool>, size_t> known_;  // Indices into races_.
  std::set<size_t> of_launch_;  // Indices into races_ of the current launch's races.
};

}  // namespace cpc::cuda::emulation
