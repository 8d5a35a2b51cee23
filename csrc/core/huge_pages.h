// Large pages for large results. The operating system maps fresh memory page by page as it is first written, which
// costs several times as much as the writing itself; pages of 2 MiB make that cost small.
#pragma once

#include <cstdint>

namespace cpc {

// Asks for large pages for memory that is about to be written in full. The system may ignore the hint. Small ranges are
// left alone.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace cpc
