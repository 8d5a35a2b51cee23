// Groups accesses of threads into requests of warps and counts what serving them takes, see traffic.h.
#include "core/cuda/emulation/traffic.h"

#include <algorithm>
#include <cstring>

namespace cpc::cuda::emulation {
namespace {

constexpr size_t kSector = 32, kWord = 4, kBanks = 32, kWidest = 16;
// Sectors of memory that are closer together than this are reported as one stretch.
constexpr uintptr_t kGapSectors = (4 << 10) / kSector;

const bool added =
    ObserverKind::add({"traffic", [](const Options& options) -> std::unique_ptr<Observer> {
                         if (!options.empty())
                           throw std::invalid_argument("traffic has no option " + options.begin()->first);
                         return std::make_unique<Traffic>();
                       }});

// The number of different units of `unit` bytes that the lanes touch.
template <class Range>
size_t different(const Range& addresses, const std::array<uint16_t, kWarp>& bytes, size_t unit,
                 std::vector<uintptr_t>& units) {
  units.clear();
  for (unsigned l = 0; l < kWarp; ++l)
    for (uintptr_t u = addresses[l] / unit; u * unit < addresses[l] + bytes[l]; ++u) units.push_back(u);
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units.size();
}

int64_t number(uint64_t n) { return static_cast<int64_t>(n); }

}  // namespace

void Traffic::launch_begins(const Launch& launch, const Sample& sample) {
  const dim3 block = launch.block;
  Counted& counted = launches_.emplace_back();
  counted.kernel = launch.name;
  counted.function = launch.kernel;
  counted.grid = sample.blocks_of_grid;
  counted.blocks_run = sample.blocks_run;
  counted.block = block.x * block.y * block.z;
  counted.shared_bytes = launch.shared_bytes;
}

void Traffic::block_begins(uint64_t) {
  block_read_.clear();
  block_written_.clear();
}

void Traffic::ask(const Key& key, unsigned thread, uintptr_t address, size_t bytes) {
  At& at = launches_.back().at[key];
  at.warps.resize(warps());
  Pending& pending = at.warps[thread / kWarp];
  const unsigned lane = thread % kWarp;
  // An access of more bytes than a thread moves at once counts as several.
  for (size_t done = 0; done < bytes; done += kWidest) {
    const uint64_t index = pending.times[lane]++ - pending.first;
    if (index >= pending.requests.size()) pending.requests.resize(index + 1);
    Request& request = pending.requests[index];
    request.address[lane] = address + done;
    request.bytes[lane] = static_cast<uint16_t>(std::min(bytes - done, kWidest));
    ++request.lanes;
    while (!pending.requests.empty() && pending.requests.front().lanes == kWarp) {
      serve(key, at.count, pending.requests.front());
      pending.requests.pop_front();
      ++pending.first;
    }
  }
}

void Traffic::access(const Access& access) {
  const Way way = access.atomic ? Way::atomic : access.write ? Way::write : Way::read;
  ask({access.place, way, access.space}, access.thread, reinterpret_cast<uintptr_t>(access.address), access.bytes);
}

void Traffic::load_matrices(const MatrixLoad& load) {
  for (unsigned l = 0; l < kWarp; ++l)
    ask({load.place, Way::matrix, Space::shared}, load.warp * kWarp + l, reinterpret_cast<uintptr_t>(load.rows[l]), 16);
}

void Traffic::copy_async(const CopyAsync& copy) {
  ++launches_.back().copies[copy.bytes];
  ask({copy.place, Way::copied_from, Space::global}, copy.thread, reinterpret_cast<uintptr_t>(copy.from), copy.valid);
  ask({copy.place, Way::copied_to, Space::shared}, copy.thread, reinterpret_cast<uintptr_t>(copy.to), copy.bytes);
}

void Traffic::multiply_add(const MultiplyAdd& product) {
  ++launches_.back().products["m" + std::to_string(product.rows) + "n" + std::to_string(product.columns) + "k" +
                              std::to_string(product.depth) + "." + product.type];
}

void Traffic::collective(const CollectiveEvent& event) {
  Counted& launch = launches_.back();
  if (std::strncmp(event.name, "__shfl", 6) == 0)
    ++launch.shuffles;
  else if (std::strcmp(event.name, "__syncwarp") == 0)
    ++launch.warp_barriers;
  else if (event.name[0] == '_')
    ++launch.votes;
}

void Traffic::serve(const Key& key, Count& count, const Request& request) {
  static thread_local std::vector<uintptr_t> units;
  ++count.requests;
  count.lanes += request.lanes;
  size_t widest = 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    count.bytes += request.bytes[l];
    widest = std::max<size_t>(widest, request.bytes[l]);
  }
  if (key.space == Space::global) {
    const size_t bytes = different(request.address, request.bytes, 1, units);
    count.ideal += (bytes + kSector - 1) / kSector;
    count.units += different(request.address, request.bytes, kSector, units);
    const bool reads = key.way == Way::read || key.way == Way::copied_from;
    (reads ? block_read_ : block_written_).insert(units.begin(), units.end());
    return;
  }
  // The number of lanes that are served together.
  const unsigned together = widest <= kWord ? kWarp : widest <= 2 * kWord ? kWarp / 2 : kWarp / 4;
  for (unsigned first = 0; first < kWarp; first += together) {
    std::array<uint16_t, kWarp> bytes{};
    std::copy_n(request.bytes.begin() + first, together, bytes.begin() + first);
    const size_t words = different(request.address, bytes, kWord, units);
    std::array<unsigned, kBanks> of_bank{};
    for (const uintptr_t word : units) ++of_bank[word % kBanks];
    count.units += *std::max_element(of_bank.begin(), of_bank.end());
    count.ideal += (words + kBanks - 1) / kBanks;
  }
}

void Traffic::block_ends() {
  Counted& launch = launches_.back();
  for (auto& [key, at] : launch.at) {
    for (Pending& pending : at.warps)
      for (const Request& request : pending.requests)
        if (request.lanes > 0) serve(key, at.count, request);
    at.warps.clear();
  }
  launch.block_sectors_read += block_read_.size();
  launch.block_sectors_written += block_written_.size();
  launch.read.insert(block_read_.begin(), block_read_.end());
  launch.written.insert(block_written_.begin(), block_written_.end());
}

// --- Reports ---

Dict Traffic::results_of(const Counted& launch, const std::map<Place, std::string>& places) const {
  static constexpr const char* kWays[] = {"read", "write", "atomic", "copied_from", "copied_to", "matrix"};
  List of_places;
  for (const auto& [key, at] : launch.at) {
    const Count& count = at.count;
    of_places.push_back(Dict{{"place", places.at(key.place)},
                             {"way", kWays[static_cast<size_t>(key.way)]},
                             {"space", key.space == Space::shared ? "shared" : "global"},
                             {"requests", number(count.requests)},
                             {"lanes", number(count.lanes)},
                             {"bytes", number(count.bytes)},
                             {"units", number(count.units)},
                             {"ideal", number(count.ideal)}});
  }
  // The stretches of memory that the blocks touched: begin, end, and the sectors read and written in them.
  std::map<uintptr_t, std::pair<bool, bool>> touched;
  for (const uintptr_t sector : launch.read) touched[sector].first = true;
  for (const uintptr_t sector : launch.written) touched[sector].second = true;
  List stretches;
  uintptr_t begin = 0, last = 0;
  uint64_t read = 0, written = 0;
  const auto close = [&] {
    if (read + written == 0) return;
    stretches.push_back(List{number(begin * kSector), number((last + 1) * kSector), number(read), number(written)});
    read = written = 0;
  };
  for (const auto& [sector, how] : touched) {
    if (read + written == 0 || sector - last > kGapSectors) {
      close();
      begin = sector;
    }
    last = sector;
    read += how.first;
    written += how.second;
  }
  close();
  Dict products, copies;
  for (const auto& [shape, count] : launch.products) products.emplace_back(shape, number(count));
  for (const auto& [bytes, count] : launch.copies) copies.emplace_back(std::to_string(bytes), number(count));
  return Dict{
      {"kernel", launch.kernel},
      {"function", name_of_function(launch.function)},
      {"grid", number(launch.grid)},
      {"block", number(launch.block)},
      {"shared_bytes", number(launch.shared_bytes)},
      {"blocks_run", number(launch.blocks_run)},
      {"places", std::move(of_places)},
      {"stretches", std::move(stretches)},
      {"block_sectors_read", number(launch.block_sectors_read)},
      {"block_sectors_written", number(launch.block_sectors_written)},
      {"mma", std::move(products)},
      {"copies", std::move(copies)},
      {"multiplies", Dict{{"float32", number(launch.arithmetic[0])}, {"float64", number(launch.arithmetic[1])}}},
      {"special", number(launch.arithmetic[2])},
      {"barriers", number(launch.barriers)},
      {"warp_barriers", number(launch.warp_barriers)},
      {"shuffles", number(launch.shuffles)},
      {"votes", number(launch.votes)}};
}

Value Traffic::results() {
  std::vector<Place> all;
  for (const Counted& launch : launches_)
    for (const auto& [key, at] : launch.at) all.push_back(key.place);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  const std::vector<std::string> names = describe(all);
  std::map<Place, std::string> places;
  for (size_t i = 0; i < all.size(); ++i) places[all[i]] = names[i];
  List results;
  for (const Counted& launch : launches_) results.push_back(results_of(launch, places));
  return results;
}

}  // namespace cpc::cuda::emulation
