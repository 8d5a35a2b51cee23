// Finds races: two accesses to a byte by different threads, at least one of them a write, that nothing orders.
//
// What orders a thread's accesses: the program, for one thread; __syncthreads, for all of a block; __syncwarp, for the
// lanes of its mask; the end of a launch, for all. Shuffles, votes, ldmatrix and mma order no memory, whatever they do to
// the lanes' progress. An asynchronous copy writes its destination and reads its source at any time between its start and
// the end of its thread's wait for it, after which it counts as an access of that thread. Atomic operations do not race
// with each other, but with plain accesses, and order nothing. Nothing orders two blocks but a barrier among them. What races is a fault even if
// both write the same value.
//
// It follows the accesses of one run, but its verdict is on all orders in which the threads could have run: it asks what
// orders two accesses, not which came first. As threads are only ordered by what many do together, a thread's vector
// clock comes down to the number of barriers before and the clocks of its warp's lanes.
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
  // What each of two accesses to a byte does.
  enum class Kind : uint8_t { read, write, atomic, copied_from, copied_to };
  struct Party {
    Kind kind;
    uint64_t block;
    unsigned thread;
    Place place;
    uint32_t turn;  // How many barriers among blocks that run together came before.
  };
  struct Race {
    std::string kernel;
    Party first, second;
    Space space;
    std::string where;  // The first byte that was found.
    uint64_t times = 1;
  };

  // Races are only collected, and no error of the launch, where `collect` is set.
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
  // An access of this block. `copy` is not 0 while it is an asynchronous copy's that has not been waited for.
  struct Stamp {
    Place place = 0;
    unsigned thread = 0;
    uint32_t epoch = 0, clock = 0;
    uint32_t copy = 0;
  };
  // What is known of a byte, since the last write that ordered all before it.
  struct Cell {
    uint64_t block_number = 0, block = 0;  // The former counts those of all launches. The rest is this block's.
    uint32_t turn = 0;
    bool written = false;
    Stamp write;
    std::vector<Stamp> reads, atomics, copied_from;
    // One access of each kind by an earlier block of the launch: all later ones are of other blocks, so one is enough.
    // The latest of each kind by each block, where blocks run together.
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
    uint32_t clocks[kWarp];                 // What it knows of the lanes of its warp; its own is the time.
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
  // Whether an earlier block's access is ordered before all that the block does now.
  bool ordered(const Party& before) const;
  void found(Space space, uintptr_t address, const Party& first, const Party& second);

  const bool collect_;
  std::string kernel_;
  std::map<std::string, int64_t> launches_;
  uint64_t block_ = 0, block_number_ = 0;
  // Where blocks run together: this one's turn, that of each, and up to which turn of others each comes after them.
  bool together_ = false;
  uint32_t turn_ = 0;
  std::map<uint64_t, uint32_t> turns_;
  std::map<uint64_t, std::map<uint64_t, uint32_t>> after_;
  uint32_t epoch_ = 0, copies_ = 0;
  std::vector<ThreadState> threads_;
  Shadow shared_, global_;
  std::vector<Race> races_;
  std::map<std::tuple<std::string, Kind, Place, Kind, Place, bool>, size_t> known_;  // Where each is in races_.
  std::set<size_t> of_launch_;  // Those that the launch has, in races_.
};

}  // namespace cpc::cuda::emulation
