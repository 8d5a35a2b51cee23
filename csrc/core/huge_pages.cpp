// Gives the hint with madvise, on Linux only.
#include "core/huge_pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/buddyinfo.h"
#endif

namespace cpc {

#if defined(__linux__)
namespace {

constexpr int64_t kPage = int64_t{2} << 20;

// True where the memory has pages already, as memory that an allocator reuses has.
bool resident(uintptr_t begin, uintptr_t end) {
  const auto there = [](uintptr_t at) {
    unsigned char state = 0;
    return mincore(reinterpret_cast<void*>(at), 1, &state) == 0 && (state & 1) != 0;
  };
  return there(begin) && there(end - kPage);
}

// The number of large pages that the kernel has free; -1 where it is unknown.
int64_t free_huge_pages() {
  char text[4096];
  const int file = open("/proc/buddyinfo", O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  const ssize_t size = read(file, text, sizeof(text) - 1);
  close(file);
  if (size <= 0) return -1;
  text[size] = 0;
  return free_huge_pages_of(text);
}

}  // namespace
#endif

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  // Allocators reuse smaller ranges, whose pages are there already.
  if (bytes < 4 * kPage) return;
  // Only pages that lie entirely inside the range: the memory around it is not ours.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (resident(begin, end)) return;
  // Where large pages are scarce, the kernel would first move other memory out of the way (compaction). This takes up
  // to 20 ms, longer than mapping small pages.
  const int64_t free = free_huge_pages();
  if (free >= 0 && free < 2 * static_cast<int64_t>((end - begin) / kPage)) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cpc
