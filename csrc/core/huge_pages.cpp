// The hint through madvise, where there is such a thing.
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

// Whether memory has been written to before, as what an allocator hands out again: its pages are there.
bool resident(uintptr_t begin, uintptr_t end) {
  const auto there = [](uintptr_t at) {
    unsigned char state = 0;
    return mincore(reinterpret_cast<void*>(at), 1, &state) == 0 && (state & 1) != 0;
  };
  return there(begin) && there(end - kPage);
}

// How many large pages the kernel has at hand; -1 where that is not told.
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
  // Only pages that lie inside the range: the neighbours belong to somebody else.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (resident(begin, end)) return;
  // Where none are left, the kernel would move other memory out of the way first (compaction), which takes it up to
  // 20 ms: longer than handing out small pages.
  const int64_t free = free_huge_pages();
  if (free >= 0 && free < 2 * static_cast<int64_t>((end - begin) / kPage)) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cpc
