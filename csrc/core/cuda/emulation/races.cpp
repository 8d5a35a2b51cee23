// Clocks and shadow memory, see races.h.
#include "core/cuda/emulation/races.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace cpc::cuda::emulation {
namespace {

const char* name_of(Races::Kind kind) {
  switch (kind) {
    case Races::Kind::read: return "read";
    case Races::Kind::write: return "write";
    case Races::Kind::atomic: return "atomic operation";
    case Races::Kind::copied_from: return "asynchronous read";
    default: return "asynchronous write";
  }
}

[[maybe_unused]] const bool known = ObserverKind::add({"races", [](const Options& options) {
                                                         int64_t collect = 0;
                                                         for (const auto& [name, value] : options) {
                                                           if (name != "collect")
                                                             throw std::invalid_argument("races has no option " + name);
                                                           collect = value;
                                                         }
                                                         return std::unique_ptr<Observer>(new Races(collect != 0));
                                                       }});

}  // namespace

// --- Time ---

void Races::launch_begins(const Launch& launch, const Sample&) {
  kernel_ = launch.name;
  ++launches_[kernel_];
  threads_.resize(size_t{launch.block.x} * launch.block.y * launch.block.z);
  global_.clear();
  of_launch_.clear();
  together_ = launch.depend == Blocks::together;
  turn_ = 0;
  turns_.clear();
  after_.clear();
}

void Races::block_begins(uint64_t block) {
  block_ = block;
  ++block_number_;
  if (together_) turn_ = ++turns_[block];
  epoch_ = 0;
  for (size_t i = 0; i < threads_.size(); ++i) {
    ThreadState& thread = threads_[i];
    std::fill(std::begin(thread.clocks), std::end(thread.clocks), 0);
    thread.clocks[i % kWarp] = 1;
    thread.groups.assign(1, {});
  }
}

// After the barrier, each block comes after everything that any of them came after, and after all that they have done.
void Races::blocks_meet(const std::vector<uint64_t>& blocks) {
  std::map<uint64_t, uint32_t> all;
  for (const uint64_t block : blocks) {
    for (const auto& [other, turn] : after_[block]) all[other] = std::max(all[other], turn);
    all[block] = turns_[block];
  }
  for (const uint64_t block : blocks) after_[block] = all;
}

bool Races::ordered(const Party& before) const {
  if (!together_) return false;
  if (before.block == block_) return true;
  const auto known = after_.find(block_);
  if (known == after_.end()) return false;
  const auto turn = known->second.find(before.block);
  return turn != known->second.end() && before.turn <= turn->second;
}

Races::ThreadState& Races::thread_state(unsigned thread) { return threads_[thread]; }

Races::Stamp Races::now(unsigned thread, Place place, uint32_t copy) {
  return {place, thread, epoch_, thread_state(thread).clocks[thread % kWarp], copy};
}

bool Races::ordered(const Stamp& before, const Stamp& now) {
  if (before.copy != 0) return false;
  if (before.thread == now.thread || before.epoch < now.epoch) return true;
  return before.thread / kWarp == now.thread / kWarp &&
         before.clock <= thread_state(now.thread).clocks[before.thread % kWarp];
}

// If kernels ever use mbarriers, arriving and waiting must pass on clocks here.
void Races::collective(const CollectiveEvent& event) {
  if (std::strcmp(event.name, "__syncwarp") != 0) return;
  const unsigned first = event.warp * kWarp;
  uint32_t latest[kWarp] = {};
  const auto for_lanes = [&](const auto& visit) {
    for (unsigned l = 0; l < kWarp; ++l)
      if (event.mask >> l & 1) visit(l, thread_state(first + l).clocks);
  };
  for_lanes([&](unsigned, const uint32_t (&clocks)[kWarp]) {
    for (unsigned l = 0; l < kWarp; ++l) latest[l] = std::max(latest[l], clocks[l]);
  });
  for_lanes([&](unsigned lane, uint32_t (&clocks)[kWarp]) {
    std::copy(std::begin(latest), std::end(latest), clocks);
    ++clocks[lane];
  });
}

// --- Accesses ---

void Races::access(const Access& a) {
  touch(a.space, a.address, a.bytes,
        a.atomic  ? Kind::atomic
        : a.write ? Kind::write
                  : Kind::read,
        now(a.thread, a.place));
}

// Counts as a read by each lane that receives the values, not by the lane that gives a row's address.
void Races::load_matrices(const MatrixLoad& load) {
  const auto read = [&](unsigned lane, const void* row, unsigned at, size_t bytes) {
    touch(Space::shared, static_cast<const char*>(row) + at, bytes, Kind::read,
          now(load.warp * kWarp + lane, load.place));
  };
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const void* const* const rows = load.rows + 8 * matrix;
      const unsigned g = lane / 4, t = lane % 4;
      if (load.transposed) {
        read(lane, rows[2 * t], 2 * g, 2);
        read(lane, rows[2 * t + 1], 2 * g, 2);
      } else {
        read(lane, rows[g], 4 * t, 4);
      }
    }
}

void Races::copy_async(const CopyAsync& copy) {
  const uint32_t number = ++copies_;
  const Stamp stamp = now(copy.thread, copy.place, number);
  touch(Space::shared, copy.to, copy.bytes, Kind::copied_to, stamp);
  touch(Space::global, copy.from, copy.valid, Kind::copied_from, stamp);
  thread_state(copy.thread).groups.back().push_back({number, copy});
}

void Races::wait_for_copies(unsigned thread, size_t pending_groups, Place) {
  auto& groups = thread_state(thread).groups;
  while (groups.size() > pending_groups + 1) {
    for (const Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

// Turns a finished copy into accesses of its thread.
void Races::finish(const Copy& copy) {
  const CopyAsync& what = copy.copy;
  const Stamp done = now(what.thread, what.place);
  for_cells(Space::shared, what.to, what.bytes, [&](Cell& cell, uintptr_t) {
    if (cell.written && cell.write.copy == copy.number) cell.write = done;
  });
  for_cells(Space::global, what.from, what.valid, [&](Cell& cell, uintptr_t) {
    if (std::erase_if(cell.copied_from, [&](const Stamp& s) { return s.copy == copy.number; }) > 0)
      add(cell.reads, done);
  });
}

void Races::touch(Space space, const void* address, size_t bytes, Kind kind, const Stamp& stamp) {
  for_cells(space, address, bytes, [&](Cell& cell, uintptr_t at) { touch_cell(cell, space, at, kind, stamp); });
}

void Races::touch_cell(Cell& cell, Space space, uintptr_t address, Kind kind, const Stamp& stamp) {
  const bool reads = kind == Kind::read || kind == Kind::copied_from;
  const bool writes = kind == Kind::write || kind == Kind::copied_to;
  const Party self = party(kind, stamp);
  for (const Party& other : cell.earlier) {
    const bool both_read = reads && (other.kind == Kind::read || other.kind == Kind::copied_from);
    const bool both_atomic = kind == Kind::atomic && other.kind == Kind::atomic;
    if (!both_read && !both_atomic && !ordered(other)) found(space, address, other, self);
  }
  const auto against = [&](const std::vector<Stamp>& others, Kind what) {
    for (const Stamp& other : others)
      if (!ordered(other, stamp)) return found(space, address, party(what, other), self);
  };
  if (cell.written && !ordered(cell.write, stamp))
    found(space, address, party(cell.write.copy != 0 ? Kind::copied_to : Kind::write, cell.write), self);
  if (!reads) {
    against(cell.reads, Kind::read);
    against(cell.copied_from, Kind::copied_from);
  }
  if (kind != Kind::atomic) against(cell.atomics, Kind::atomic);
  if (writes) {
    cell.written = true;
    cell.write = stamp;
    cell.reads.clear();
    cell.atomics.clear();
    // Copies stay until they are waited for, as this write may have been reported for only one of them.
  } else if (kind == Kind::copied_from) {
    cell.copied_from.push_back(stamp);
  } else {
    add(kind == Kind::atomic ? cell.atomics : cell.reads, stamp);
  }
}

// Keeps as few unordered accesses as are needed to find later races. An access that is ordered before the new one is
// not needed: whatever races with it later also races with the new one. One access each of two warps between the same
// barriers is enough: a thread of either warp races with the other's access, a thread of a third warp with both, and
// the next barrier orders all of them.
void Races::add(std::vector<Stamp>& to, const Stamp& stamp) {
  std::erase_if(to, [&](const Stamp& before) { return ordered(before, stamp); });
  const auto other_warp = [&](const Stamp& one) {
    return [&one](const Stamp& s) { return s.thread / kWarp != one.thread / kWarp; };
  };
  if (!to.empty() && std::any_of(to.begin(), to.end(), other_warp(to.front()))) return;
  to.push_back(stamp);
}

// --- Shadow memory ---

Races::Line& Races::Shadow::line(uintptr_t address) {
  const uintptr_t number = address / (kLine * kLinesOfPage);
  if (last == nullptr || number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    last = page.get();
    last_number = number;
  }
  return last->lines[address / kLine % kLinesOfPage];
}

void Races::Shadow::clear() {
  pages.clear();
  last = nullptr;
}

template <class Visit>
void Races::for_cells(Space space, const void* address, size_t bytes, const Visit& visit) {
  for (uintptr_t at = reinterpret_cast<uintptr_t>(address), end = at + bytes; at < end;) {
    Line& line = shadow(space).line(at);
    const uintptr_t base = at / kLine * kLine, stop = std::min(end, base + kLine);
    // The number of cells that begin before a byte of the line.
    const auto cells_before = [&](uintptr_t byte) {
      return static_cast<size_t>(std::popcount(line.cuts & ((1u << (byte - base)) - 1)));
    };
    for (const uintptr_t cut : {at, stop})
      if (cut < base + kLine && (line.cuts >> (cut - base) & 1) == 0) {
        const size_t before = cells_before(cut);
        line.cells.insert(line.cells.begin() + static_cast<ptrdiff_t>(before), Cell(line.cells[before - 1]));
        line.cuts |= 1u << (cut - base);
      }
    const size_t first = cells_before(at), last = cells_before(stop);
    for (size_t i = first; i < last; ++i) {
      begin_block(line.cells[i], space);
      visit(line.cells[i], at);
    }
    at = stop;
  }
}

// When a block first touches a cell, moves what earlier blocks left in it to `earlier`.
void Races::begin_block(Cell& cell, Space space) const {
  if (cell.block_number == block_number_) return;
  if (space == Space::global && cell.block_number != 0) {
    const auto keep = [&](Kind kind, const std::vector<Stamp>& stamps) {
      if (stamps.empty()) return;
      const auto known = std::find_if(cell.earlier.begin(), cell.earlier.end(), [&](const Party& other) {
        return other.kind == kind && (!together_ || other.block == cell.block);
      });
      const Party one{kind, cell.block, stamps.front().thread, stamps.front().place, cell.turn};
      if (known == cell.earlier.end())
        cell.earlier.push_back(one);
      else if (together_)
        *known = one;
    };
    if (cell.written) keep(Kind::write, {cell.write});
    keep(Kind::read, cell.reads);
    keep(Kind::copied_from, cell.copied_from);
    keep(Kind::atomic, cell.atomics);
  }
  cell.block_number = block_number_;
  cell.block = block_;
  cell.turn = turn_;
  cell.written = false;
  cell.reads.clear();
  cell.atomics.clear();
  cell.copied_from.clear();
}

// --- Reports ---

void Races::found(Space space, uintptr_t address, const Party& first, const Party& second) {
  const auto [at, is_new] = known_.try_emplace(
      {kernel_, first.kind, first.place, second.kind, second.place, first.block == second.block}, races_.size());
  if (is_new)
    races_.push_back({kernel_, first, second, space, name_of_address(reinterpret_cast<const void*>(address))});
  else
    ++races_[at->second].times;
  of_launch_.insert(at->second);
}

void Races::launch_ends() {
  if (collect_ || of_launch_.empty()) return;
  size_t left_to_name = 5;
  std::string text =
      "kernel " + kernel_ + ": " + std::to_string(of_launch_.size()) + (of_launch_.size() == 1 ? " race" : " races");
  for (const size_t i : of_launch_) {
    if (left_to_name-- == 0) break;
    const Race& race = races_[i];
    const std::vector<std::string> places = describe({race.first.place, race.second.place});
    const auto one = [&](const Party& party, const std::string& place) {
      return std::string(name_of(party.kind)) + " by block " + std::to_string(party.block) + ", thread " +
             std::to_string(party.thread) + " in " + place;
    };
    text += "\n" + race.where + ": " + one(race.first, places[0]) + "\n  and " + one(race.second, places[1]);
  }
  throw std::runtime_error(text);
}

Value Races::results() {
  List all;
  for (const Race& race : races_) {
    const std::vector<std::string> places = describe({race.first.place, race.second.place});
    const auto one = [&](const Party& party, const std::string& place) {
      return Dict{{"kind", name_of(party.kind)},
                  {"block", static_cast<int64_t>(party.block)},
                  {"thread", static_cast<int64_t>(party.thread)},
                  {"place", place}};
    };
    all.push_back(Dict{{"kernel", race.kernel},
                       {"space", race.space == Space::shared ? "shared" : "global"},
                       {"where", race.where},
                       {"first", one(race.first, places[0])},
                       {"second", one(race.second, places[1])},
                       {"times", static_cast<int64_t>(race.times)}});
  }
  Dict launches;
  for (const auto& [kernel, number] : launches_) launches.emplace_back(kernel, number);
  return Dict{{"launches", launches}, {"races", all}};
}

}  // namespace cpc::cuda::emulation
