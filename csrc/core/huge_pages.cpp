// The hint through madvise, where there is such a thing.
#include "core/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cpc {

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = int64_t{2} << 20;
  // Allocators reuse smaller ranges, whose pages are there already.
  if (bytes < 4 * kPage) return;
  // Only pages that lie inside the range: the neighbours belong to somebody else.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cpc
